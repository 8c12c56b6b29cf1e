"""Number classes by the model's names, and read which class an image is of where no folder tells.

FORMS lists the files of classes that are read. Numbers are never taken for places in the sorted names: those
of ImageNet's development kit are in another order.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from utils import InputError

FORMS = (
    "lines 'file,class' or 'file class', as in LOC_val_solution.csv; one class name a line, in the order of"
    " the file names; or the numbers of ILSVRC2012_validation_ground_truth.txt, with meta.mat beside it or"
    " --val-synsets FILE"
)


def class_numbers(source: object, names: Iterable[str], given: list[str] | None) -> dict[str, int]:
    """Return the number of each class: its place among the model's classes, or else among its own.

    Args:
        source: of the names, in errors.
        names: classes of some data.
        given: the model's classes in order, if they are known.

    Raises:
        InputError: the data have a class that the model lacks, or two classes have one name.
    """
    names = list(names)
    classes = given or names
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        whose = "the model" if given else source
        raise InputError(f"{whose} has two classes {twice[0]!r}: images cannot be told apart by that name")
    if unknown := sorted(set(names) - set(classes)):
        raise InputError(f"{source} has the class {unknown[0]!r}, which is not among the model's classes")
    return {name: number for number, name in enumerate(classes)}


# Files that tell the classes of images


def read_classes(
    file: str | Path, images: list[str], given: list[str] | None, synsets: str | Path | None = None
) -> list[str]:
    """Read the class name of each image of a folder.

    Args:
        file: in one of FORMS; a table may name more images than there are.
        images: their paths, in the order of the file names.
        given: the model's classes, if they are known.
        synsets: file that tells which class a number of the development kit means.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file has another form, or an image no class in it, or it is not known what a number
            means.
    """
    lines = read_lines(file)
    if not lines:
        raise InputError(f"{file} is empty: --val-labels reads {FORMS}")
    names = by_image(file, lines, images)
    if names is None:
        names = lines
        if len(lines) != len(images) or any("," in line for line in lines):
            raise InputError(
                f"{file} names none of the images, such as {images[0]}, and is no list of one class name for"
                f" each of the {len(images)}: --val-labels reads {FORMS}"
            )
        if images != sorted(images, key=by_number):
            raise InputError(
                f"{file} has no names of images, and the order of theirs is not clear, as that of 10 and 9:"
                " write lines 'file,class'"
            )
        if all(is_number(line) for line in lines):
            return by_development_kit(file, lines, synsets)
    if synsets:
        raise InputError(f"--val-synsets: {file} does not hold the development kit's numbers")
    if numbers := [name for name in names if is_number(name) and name not in (given or [])]:
        raise InputError(
            f"{file} has the number {numbers[0]}, which is none of the model's class names: give names,"
            " because it is not known in which order the classes are numbered"
        )
    return names


def read_lines(file: str | Path) -> list[str]:
    """Return the lines of a text that are not blank."""
    text = Path(file).read_text("utf-8-sig", errors="surrogateescape")
    return [line.strip() for line in text.splitlines() if line.strip()]


def cells(line: str) -> list[str]:
    """Split a line at its commas, else at its tabs, else behind its first word."""
    if "," in line:
        return [cell.strip() for cell in next(csv.reader([line], skipinitialspace=True))]
    return [cell.strip() for cell in (line.split("\t") if "\t" in line else line.split(maxsplit=1))]


def by_number(path: str) -> list[str | int]:
    """Return a key that sorts names as a reader does, 9 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


def is_number(text: str) -> bool:
    try:
        return float(text) is not None
    except ValueError:
        return False


def by_image(file: str | Path, lines: list[str], images: list[str]) -> list[str] | None:
    """Return the class name of each image from lines that start with a file's name, or with its stem.

    Lines that start otherwise are of other images, or a heading. None where all are.
    """
    names = [os.path.basename(path) for path in images]
    stems = Counter(os.path.splitext(name)[0] for name in names)
    known = {stem: name for name in names if stems[stem := os.path.splitext(name)[0]] == 1}
    known |= {name: name for name in names}
    classes: dict[str, str] = {}
    for line in lines:
        key, *rest = cells(line)
        name = known.get(key.rpartition("/")[2])
        if name is None:
            continue
        if len(rest) != 1 or not rest[0]:
            raise InputError(f"{file}: {line!r} is not an image and its class")
        own = without_boxes(rest[0])
        if own is None or classes.setdefault(name, own) != own:
            raise InputError(f"{file} has several classes for {name}")
    if missing := [path for path, name in zip(images, names, strict=True) if name not in classes]:
        if classes:
            raise InputError(f"{file} has no class for {missing[0]}")
        return None
    return [classes[name] for name in names]


def without_boxes(text: str) -> str | None:
    """Return the class of a cell: all of it, or that of the boxes in 'class left top right bottom ...'.

    None where the boxes are of several classes.
    """
    words = text.split()
    objects = [words[at : at + 5] for at in range(0, len(words), 5)]
    if not all(len(part) == 5 and all(map(is_number, part[1:])) for part in objects):
        return text
    return words[0] if len({part[0] for part in objects}) == 1 else None


def by_development_kit(file: str | Path, numbers: list[str], synsets: str | Path | None) -> list[str]:
    """Return class names of ImageNet for the numbers of its development kit.

    Raises:
        InputError: no file tells what the numbers mean, or it lacks one of them.
    """
    beside = Path(file).with_name("meta.mat")
    if synsets is None and not beside.is_file():
        raise InputError(
            f"{file} holds numbers alone, and ImageNet's development kit does not number classes in the order"
            " of their names: put its meta.mat beside the file, give --val-synsets FILE with lines"
            " 'number class', or write lines 'file,class'"
        )
    names = read_synsets(synsets or beside)
    if missing := [text for text in numbers if not text.isdecimal() or int(text) not in names]:
        raise InputError(f"{synsets or beside} does not tell which class the number {missing[0]} is")
    return [names[int(number)] for number in numbers]


def read_synsets(file: str | Path) -> dict[int, str]:
    """Read class names by number from meta.mat, or from a text with lines 'number class' or 'class number'.

    What stands behind the two in a line is not read.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it has another form, or a number or a name twice.
    """
    file = Path(file)
    if file.suffix == ".mat":
        from scipy.io import loadmat  # slow to import

        try:
            with open(file, "rb") as opened:
                table = loadmat(opened, squeeze_me=True)["synsets"]
            pairs = [(int(row["ILSVRC2012_ID"]), str(row["WNID"])) for row in table]
        except OSError:
            raise
        except Exception as error:  # loadmat raises many kinds on another file
            raise InputError(f"{file} is not the meta.mat of ImageNet's development kit ({error})") from error
    else:
        pairs = []
        for line in read_lines(file):
            first, second, *_ = [*line.replace(",", " ").split(), "", ""]
            number, name = (first, second) if first.isdecimal() else (second, first)
            if not number.isdecimal() or not name or name.isdecimal():
                raise InputError(f"{file}: {line!r} is not 'number class' or 'class number'")
            pairs.append((int(number), name))
    names = dict(pairs)
    if len(names) < len(pairs) or len(set(names.values())) < len(pairs):
        raise InputError(f"{file} has a number or a class twice")
    if min(names, default=1) != 1:
        raise InputError(f"{file} starts at the number {min(names)}, the development kit at 1")
    return names
