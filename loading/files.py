"""List the class folders and the image files of a tree, and count by reason what is left out of it.

Names that begin with a dot are no data. Links are followed, to files and to folders.
"""

import os
from collections import Counter
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from utils import log

IMAGE_ENDINGS = (*IMG_EXTENSIONS, ".gif", ".jfif", ".jpe")  # in upper case as well
HIDDEN = "hidden"  # the reason to leave out a name that begins with a dot


def list_folders(root: str | Path, left_out: Counter[str]) -> list[str]:
    """Return the names of the folders in a folder, sorted.

    Args:
        root: the folder.
        left_out: counts its other entries by reason.

    Raises:
        FileNotFoundError: an entry is a link that leads nowhere, which may stand for a class.
    """
    names = []
    for name in sorted(os.listdir(root)):
        path = os.path.join(root, name)
        if name.startswith("."):
            left_out[HIDDEN] += 1
        elif os.path.isdir(path):
            names.append(name)
        elif os.path.exists(path):
            left_out["beside the class folders"] += 1
        else:
            raise FileNotFoundError(f"{path} is a link that leads nowhere: mend or remove it")
    return names


def list_images(root: str | Path, left_out: Counter[str], around: frozenset[Path] = frozenset()) -> list[str]:
    """Return the paths of the image files below a folder, at any depth.

    A link to a folder around it would lead in circles and is left out. A link that leads nowhere is listed if
    its name is that of an image: whoever reads it tells that it cannot be read.

    Args:
        root: the folder.
        left_out: counts what is no image by reason.
        around: real paths of the folders around `root`.
    """
    real, paths = Path(os.path.realpath(root)), []
    around |= {real, *real.parents}
    with os.scandir(root) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            linked, ending = entry.is_symlink(), os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                left_out[HIDDEN] += 1
            elif linked and Path(os.path.realpath(entry)) in around:
                left_out["linked to a folder around it"] += 1
            elif os.path.isdir(entry) if linked else entry.is_dir():
                paths += list_images(entry.path, left_out, around)
            elif ending not in IMAGE_ENDINGS:
                left_out[ending or "without an ending"] += 1
            elif linked or entry.is_file():
                paths.append(entry.path)
            else:
                left_out["of a kind that cannot be read"] += 1  # such as a pipe
    return paths


def describe(left_out: Counter[str]) -> str:
    """Return what is left out in words, the most frequent reason first; "" where nothing is."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
    return f"left out: {reasons}" if reasons else ""


def report(root: str | Path, left_out: Counter[str]) -> None:
    """Log in one line what is left out of a folder, if anything is."""
    if left_out:
        log.info("%s: %s", root, describe(left_out))
