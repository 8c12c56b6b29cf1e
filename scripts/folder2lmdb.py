"""Put the images of a folder into one LMDB file per split, which main_deit.py reads with --use-lmdb.

    python scripts/folder2lmdb.py --dir IMAGENET
    python main_deit.py --data-path IMAGENET --use-lmdb ...

DIR/train/CLASS/IMAGE becomes DIR/train.lmdb: the files as they are, neither decoded nor compressed again.
An unfinished file is called .train.lmdb.part, and a second call goes on where the first one ended. A file
gets its name when everything in it has been compared with the folder.
"""

import _root as _root

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import datasets
import utils
from loading import archives
from utils import InputError, log

if TYPE_CHECKING:
    import lmdb

Images = datasets.Folder | datasets.LabelledFolder

SOURCE = b"__source__"  # key of `source_of` the folder
EXTRA = (archives.LENGTH, archives.CLASSES, archives.LABELS, SOURCE)
BATCH = 128  # images per transaction: a killed run repeats no more
MAP = 2**28  # bytes that a new file may grow to before its map does


def source_of(folder: Images) -> bytes:
    """Return a hash of the classes, paths and labels of a folder, in their order."""
    listed = [[str(Path(path).relative_to(folder.root)), label] for path, label in folder.samples]
    return hashlib.sha256(json.dumps([folder.classes, listed]).encode()).hexdigest().encode()


def records(folder: Images, start: int, batch: int, threads: int) -> Iterator[list[tuple[bytes, bytes]]]:
    """Yield keys and values of the images from number `start` on, in batches."""

    def read(index: int) -> tuple[bytes, bytes]:
        path, label = folder.samples[index]
        return b"%d" % index, archives.pack(label, Path(path).read_bytes())

    with ThreadPoolExecutor(threads) as pool:
        for first in range(start, len(folder), batch):
            yield list(pool.map(read, range(len(folder))[first : first + batch]))


def put(environment: "lmdb.Environment", items: list[tuple[bytes, bytes]]) -> None:
    """Write all items or none; double a map that is full."""
    lmdb = archives.import_lmdb()
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in items:
                    transaction.put(key, value)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])


def count(environment: "lmdb.Environment") -> int:
    """Count the images in a file, which are always the folder's first ones."""
    with environment.begin() as transaction:
        return transaction.stat()["entries"] - sum(transaction.get(key) is not None for key in EXTRA)


def fill(environment: "lmdb.Environment", folder: Images, name: str, batch: int, threads: int) -> None:
    """Write the images that a file lacks, and compare all of it with the folder.

    Raises:
        InputError: the file is of another folder, or the folder has changed since it was read.
    """
    source, total = source_of(folder), len(folder)
    with environment.begin() as transaction:
        stored = transaction.get(SOURCE)
    if stored is None:
        put(environment, [(SOURCE, source), (archives.CLASSES, json.dumps(folder.classes).encode())])
    elif stored != source:
        raise InputError("it was begun with other classes or files")
    done = count(environment)
    with utils.progress(total, initial=done) as bar:
        if done:
            log.info("%s: %d of %d images are there", name, done, total)
        for items in records(folder, done, batch, threads):
            put(environment, items)
            advance(bar, len(items), f"{name}: written")
    labels = json.dumps(sorted(folder.present())).encode()
    put(environment, [(archives.LENGTH, b"%d" % total), (archives.LABELS, labels)])
    with utils.progress(total) as bar:
        for items in records(folder, 0, batch, threads):
            with environment.begin(buffers=True) as transaction:
                for key, value in items:
                    if transaction.get(key) != value:
                        raise InputError(f"{folder.samples[int(key)][0]} has changed since it was read")
            advance(bar, len(items), f"{name}: compared")
    if count(environment) != total:
        raise InputError(f"it holds {count(environment)} images instead of {total}")


def advance(bar, images: int, text: str) -> None:
    """Move a bar, and log a line for every tenth of the images."""
    before, total = bar.n, bar.total
    bar.update(images)
    if bar.n * 10 // total > before * 10 // total:
        rate, left = utils.rate_and_left(bar)
        log.info("%s %d of %d images, %.0f img/s, %s left", text, bar.n, total, rate, left)


def convert(folder: Images, target: Path, threads: int = 4, batch: int = BATCH, map_size: int = MAP) -> None:
    """Make an LMDB file of a folder, or finish one.

    Args:
        folder: the images.
        target: the file; a finished one of the same images is left as it is.
        threads: that read images.
        batch: images per transaction.
        map_size: bytes that the file may take at first.

    Raises:
        InputError: there is a file of other images, the images have changed meanwhile, or lmdb is missing.
        OSError: the file cannot be written.
    """
    lmdb = archives.import_lmdb()
    if target.exists():
        archives.Lmdb(target)
        if archives.entry(os.path.abspath(target), SOURCE) != source_of(folder):
            raise InputError(f"{target} holds other images than {folder.root}: remove it, or give --output")
        log.info("%s is there already", target)
        return
    unfinished = target.with_name(f".{target.name}.part")
    try:
        with lmdb.open(str(unfinished), subdir=False, map_size=map_size) as environment:
            fill(environment, folder, target.name, batch, threads)
    except InputError as error:
        raise InputError(f"{unfinished}: {error}; remove it and begin anew") from error
    except lmdb.Error as error:
        raise OSError(f"cannot write {unfinished}: {error}") from error
    os.replace(unfinished, target)
    unfinished.with_name(f"{unfinished.name}-lock").unlink(missing_ok=True)
    log.info("%s: %d images, all as in %s", target, len(folder), folder.root)


def parse() -> argparse.Namespace:
    parser = utils.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dir", required=True, type=Path, metavar="DIR", help="folder with train/CLASS/IMAGE and val/")
    add("--output", type=Path, metavar="DIR", help="where SPLIT.lmdb go; default: --dir")
    add(
        "--splits",
        nargs="+",
        default=["train", "val"],
        metavar="SPLIT",
        help="folders to convert (train val)",
    )
    datasets.add_val_labels(parser)
    add(
        "--num_workers",
        "--workers",
        type=utils.POSITIVE_INT,
        default=4,
        metavar="N",
        help="reading threads (4)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    utils.start_logging(utils.Context(torch.device("cpu"), 0, 1))
    labels = dict(val_labels=args.val_labels, val_synsets=args.val_synsets)
    source = datasets.DataSource("IMNET", args.dir, **labels)
    folders = {split: datasets.build_dataset(source, split) for split in args.splits}
    output = args.output or args.dir
    output.mkdir(parents=True, exist_ok=True)
    for split, folder in folders.items():
        convert(folder, output / f"{split}.lmdb", args.num_workers)


if __name__ == "__main__":
    utils.run_command(main)
