"""Read data sets that come as archives: LMDB files and WebDataset's tar shards.

Each is read by index, as a folder is, so that shuffling, sharding and repeating are those of any other data
set. Nothing is ever unpickled.
"""

import hashlib
import io
import json
import logging
import os
import struct
import tarfile
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.data.readers import create_reader
from torch.utils.data import Dataset

from loading.classes import class_numbers
from loading.images import load_image
from utils import InputError, values_given, write_atomically

if TYPE_CHECKING:
    import lmdb

log = logging.getLogger("adaptive-vit")


def import_extra(package: str, purpose: str) -> ModuleType:
    """Import a package that only some data sets need; InputError where it is missing."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise InputError(f"{purpose} needs the package {package}: pip install {package}") from error


def import_lmdb() -> ModuleType:
    return import_extra("lmdb", "an LMDB file")


class Archive(Dataset):
    """Hold encoded images by index, with their classes; an item is (image, label).

    Attributes:
        side: see images.load_image.

    Args:
        source: name of the archive in errors.
        names: of its classes by number; where it has none, how many there are.
        model_classes: class names in the model's order; default: the archive's own.
        transform: from image to model input.

    Raises:
        InputError: the archive has classes that the model lacks.
    """

    side = 0

    def __init__(
        self, source: str, names: list[str] | int, model_classes: list[str] | None, transform: Callable | None
    ):
        self.source, self.transform = source, transform
        if isinstance(names, int):  # the numbers are then taken to be those of the model
            if model_classes and names > len(model_classes):
                raise InputError(f"{source} has {names} classes, but the model {len(model_classes)}")
            self.numbers = list(range(names))
            self.classes = model_classes or [str(number) for number in range(names)]
            if not all(map(str.isdecimal, self.classes)):
                log.info("%s does not name its classes: their numbers are taken for the model's", source)
        else:
            order = class_numbers(source, names, model_classes)
            self.classes, self.numbers = list(order), [order[name] for name in names]

    def present(self) -> set[int]:
        """Return the numbers, of the model, that images have."""
        return {self.numbers[label] for label in self.labels()}

    def labels(self) -> set[int]:
        """Return the class numbers in the archive that images have."""
        raise NotImplementedError

    def record(self, index: int) -> tuple[bytes, int]:
        """Return an image's file and its class number in the archive."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        data, label = self.record(index)
        where = f"{self.source}, record {index}"
        if not isinstance(label, int) or not 0 <= label < len(self.numbers):
            raise InputError(f"{where} has the label {label!r}: it must be 0 to {len(self.numbers) - 1}")
        image = load_image(io.BytesIO(data), where, self.side)
        return (self.transform(image) if self.transform else image), self.numbers[label]


# LMDB. Keys are decimal indices, in the order of datasets.Folder, and these two:
LENGTH, CLASSES = b"__len__", b"__classes__"  # plain ASCII; JSON list
LABELS = b"__labels__"  # JSON list of the class numbers that images have; files made before lack it
MAGIC, VERSION = b"IMGR", 1
HEADER = struct.Struct("<4sIq")  # magic, version, label; the image's file follows

environments: dict[str, tuple[int, "lmdb.Environment"]] = {}  # process and handle, by file


def pack(label: int, data: bytes) -> bytes:
    """Return the record of a class number and an image's file."""
    return HEADER.pack(MAGIC, VERSION, label) + data


def environment(path: str) -> "lmdb.Environment":
    """Open a file for reading, once per process, and return its handle.

    A handle must not be used in another process than its own, and a process must not open a file twice. So
    handles are kept here and not in the data set, which can then be pickled and forked into workers.

    Raises:
        InputError: the file is damaged, or the package lmdb is missing.
    """
    process, handle = environments.get(path, (None, None))
    if process == os.getpid():
        return handle
    if handle:  # inherited through a fork: this closes the copy, not the parent's
        handle.close()
    lmdb = import_lmdb()
    again = "convert the folder again with scripts/folder2lmdb.py"
    try:
        handle = lmdb.open(path, subdir=False, readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise InputError(f"{path} is not a readable LMDB file ({error}): {again}") from error
    if (handle.info()["last_pgno"] + 1) * handle.stat()["psize"] > os.path.getsize(path):
        handle.close()  # reading behind the end would kill the process
        raise InputError(f"{path} is cut off: copy it, or {again}")
    environments[path] = os.getpid(), handle
    return handle


def entry(path: str, key: bytes) -> bytes | None:
    """Return the value of a key, None if there is none; InputError where the file is damaged."""
    lmdb = import_lmdb()
    try:
        with environment(path).begin() as transaction:
            return transaction.get(key)
    except lmdb.Error as error:
        raise InputError(f"{path}, key {key.decode()}: {error}; convert the folder again") from error


class Lmdb(Archive):
    """Read a split from an LMDB file, as scripts/folder2lmdb.py makes it.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is damaged, of another kind, or has classes that the model lacks.
    """

    def __init__(self, path: str | Path, transform: Callable | None = None, classes: list[str] | None = None):
        self.path = os.path.abspath(path)
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"no file {path}: make it with scripts/folder2lmdb.py")
        first, length, names = (entry(self.path, key) for key in (b"0", LENGTH, CLASSES))
        if first is None or length is None or names is None or not first.startswith(MAGIC):
            raise InputError(
                f"{path} is of another layout, such as another script's pyarrow records:"
                " convert the folder again with scripts/folder2lmdb.py"
            )
        self.length, names = int(length), json.loads(names)
        if hidden := [name for name in names if name.startswith(".")]:
            raise InputError(f"{path} has the hidden folder {hidden[0]} as a class: convert the folder again")
        super().__init__(str(path), names, classes, transform)

    def __len__(self) -> int:
        return self.length

    def labels(self) -> set[int]:
        return set(json.loads(entry(self.path, LABELS) or json.dumps(list(range(len(self.numbers))))))

    def record(self, index: int) -> tuple[bytes, int]:
        value = entry(self.path, b"%d" % index)
        if value is None or len(value) < HEADER.size or value[:4] != MAGIC:
            raise InputError(f"{self.source}, record {index} is missing or damaged: convert the folder again")
        _, version, label = HEADER.unpack_from(value)
        if version != VERSION:
            raise InputError(f"{self.source}, record {index} has version {version}, known is {VERSION}")
        return value[HEADER.size :], label


class Shards(Archive):
    """Read WebDataset's tar files on disk; a sample is an image and a .cls or .json with its label.

    timm's reader streams shards and cannot give every image exactly once: workers get whole shards, a process
    with the smaller ones repeats images, and evaluation on several processes leaves some out. Here the reader
    only names the shards of a split. Images are read by their places in the shards, which are looked up once
    and kept in torch.hub's folder.

    A split is one that the folder's _info.json lists, a pattern in timm's form (val-{000..003}.tar), or
    SPLIT.tar, SPLIT-*.tar, SPLIT/*.tar. Class names are the lines of classes.txt, if that is there.

    Args:
        root: folder of the shards.
        names: of the split: the first that is there.
        transform: from image to model input.
        classes: class names in the model's order.
        image_key: endings of the images, with semicolons between them as timm takes them.
        label_key: field of the class number in .json; default: the one that _info.json names, else .cls.
    """

    IMAGES = "jpg;jpeg;png;webp"

    def __init__(
        self,
        root: Path,
        names: list[str],
        transform: Callable | None = None,
        classes: list[str] | None = None,
        image_key: str | None = None,
        label_key: str | None = None,
    ):
        self.paths, key, lengths = find_shards(root, names)
        places = places_of(self.paths, image_key or self.IMAGES, label_key or key)
        for number, length in enumerate(lengths):
            if (count := np.count_nonzero(places["shard"] == number)) != length:
                raise InputError(f"{self.paths[number]} holds {count} images and _info.json says {length}")
        labelled = places["label"] >= 0  # timm leaves out a sample with -1 as well
        self.places = {name: column[labelled] for name, column in places.items()}
        if unlabelled := np.count_nonzero(~labelled):
            log.info("%s (%s): left out: %d without a class", root, names[0], unlabelled)
        if not len(self):
            raise FileNotFoundError(f"no image in {self.paths[0]} and the other shards of {names[0]}")
        largest = int(self.places["label"].max())
        file = root / "classes.txt"
        with values_given(f"{file} is no text file"):
            listed = [line.strip() for line in file.read_text().splitlines()] if file.is_file() else []
        if listed and largest >= len(listed):
            raise InputError(f"{file} has {len(listed)} classes, and there is a label {largest}")
        super().__init__(f"{root} ({names[0]})", listed or largest + 1, classes, transform)

    def __len__(self) -> int:
        return len(self.places["label"])

    def labels(self) -> set[int]:
        return set(self.places["label"].tolist())

    def record(self, index: int) -> tuple[bytes, int]:
        shard, offset, size, label = (int(self.places[name][index]) for name in PLACE)
        with open(self.paths[shard], "rb") as file:
            file.seek(offset)
            return file.read(size), label


PLACE = ("shard", "offset", "size", "label")


def find_shards(root: Path, names: list[str]) -> tuple[list[Path], str, tuple[int, ...]]:
    """Find the shards of a split.

    Args:
        root: folder of the shards.
        names: of the split: the first that is there.

    Returns:
        The shards, the key of the labels in .json files ("" for .cls), and how many images each shard holds,
        () where no file says so.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: wds/ reads shards on disk")
    described = any((root / name).is_file() for name in ("_info.json", "info.json"))
    reason = f"it needs an _info.json that lists them, or files {names[0]}-*.tar"
    for name in names:
        if described or "tar" in name or ".." in name:
            import_extra("webdataset", "--data-set wds/")
            try:
                split = create_reader("wds/", root=str(root), split=name).split_info
            except (RuntimeError, KeyError, TypeError, ValueError) as error:
                reason = str(error)
                continue
            return [root / file for file in split.filenames], split.alt_label, tuple(split.shard_lengths)
        patterns = (f"{name}.tar", f"{name}[!a-z]*.tar", f"{name}/*.tar")
        paths = {path for pattern in patterns for path in root.glob(pattern)}
        if paths := sorted(path for path in paths if not path.name.startswith(".")):
            return paths, "", ()
    raise FileNotFoundError(f"{root} has no shards of {names[0]}: {reason}")


def places_of(paths: list[Path], endings: str, key: str) -> dict[str, np.ndarray]:
    """Return shard, offset and size in bytes, and label of every image, each as an int64 array.

    Args:
        paths: of the shards; those scanned before are not scanned again.
        endings, key: see `scan`.
    """
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"no shard {missing[0]}")
    files = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    stamp = hashlib.sha256(json.dumps([2, endings, key, files]).encode()).hexdigest()
    cache = Path(torch.hub.get_dir()) / "shards" / f"{stamp}.npz"
    if cache.is_file():
        with np.load(cache) as arrays:
            return dict(arrays)
    log.info("looking up the images of %d shards, %s and on", len(paths), paths[0])
    rows = [(number, *place) for number, path in enumerate(paths) for place in scan(path, endings, key)]
    places = dict(zip(PLACE, np.array(rows, np.int64).reshape(-1, len(PLACE)).T, strict=True))

    def write(path: Path) -> None:
        with open(path, "wb") as file:  # savez would give a path another ending
            np.savez(file, **places)

    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, write)
    except OSError as error:
        log.info("their places are not kept for the next run: %s", error)
    return places


def is_hidden(name: str) -> bool:
    """Tell whether a part of a path begins with a dot, other than the folder itself and the one around it."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def scan(path: Path, endings: str, key: str) -> Iterator[tuple[int, int, int]]:
    """Yield offset, size and label of every image of a shard.

    Members in a row that share their name up to the first dot are one sample. Those whose name, or that of a
    folder they are in, begins with a dot are no data.

    Args:
        path: of the shard.
        endings: of the images, with semicolons between them: the first that a sample has.
        key: of the labels in .json files, "" for .cls.

    Raises:
        InputError: the shard is damaged or compressed, or an image has no label, or a label no image.
    """

    def stem(member: tarfile.TarInfo) -> tuple[str, str]:
        folder, _, name = member.name.rpartition("/")
        return folder, name.partition(".")[0]

    try:
        with tarfile.open(path, "r:") as tar:
            files = [member for member in tar if member.isfile() and not is_hidden(member.name)]
            # tarfile takes a damaged header, and a file cut between two members, for the end.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"cut off or damaged at byte {tar.offset}")
            for (folder, name), members in groupby(files, stem):
                parts = {m.name.rpartition("/")[2].partition(".")[2].lower(): m for m in members}
                there = ", ".join(f".{part}" for part in parts)
                try:
                    image = next(parts[kind] for kind in endings.lower().split(";") if kind in parts)
                    label = tar.extractfile(parts["json" if key else "cls"]).read()
                    if key:
                        fields = json.loads(label)
                        there += f" with the fields {', '.join(fields)}"
                        label = fields[key]
                    label = int(label)
                except (StopIteration, KeyError, ValueError, TypeError) as error:
                    where = f"the field {key} of .json" if key else ".cls"
                    raise InputError(
                        f"{path}: sample {folder and folder + '/'}{name} needs an image ({endings}) and a"
                        f" class number in {where}, and has {there}: see --image-key, --label-key"
                    ) from error
                yield image.offset_data, image.size, label
    except tarfile.TarError as error:
        raise InputError(f"{path} is not a readable tar file without compression ({error})") from error
