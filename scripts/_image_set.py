"""Shared by the scripts that make sets of images: drawing, worker processes, boxes, record, command line.

DIR/{train,val,test}/CLASS/NNNNNN.png   or .jpg
DIR/boxes.csv                           each file's label, its object's box in px and the object's source
DIR/NAME.json                           the arguments; called again with the same ones, nothing is done
DIR/ATTRIBUTION.txt                     whose works the sources are
"""

from __future__ import annotations

import argparse
import csv
import errno
import functools
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from tqdm import tqdm

CHUNK = 250  # images per task of a worker
COLUMNS = {"train": slice(0, 320), "val": slice(320, 480), "test": slice(480, 640)}  # of both photographs
SPLITS = list(COLUMNS)
PHOTOGRAPHS = """\
Photographs, as given by sklearn.datasets.load_sample_images, which names these sources:
china.jpg by danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035/
flower.jpg by vultilion, https://www.flickr.com/photos/vultilion/6056698931/
both CC BY 2.0 (https://creativecommons.org/licenses/by/2.0/).
"""


class Box(NamedTuple):
    """Give the place of a square, in px of an image that is not enlarged."""

    left: float
    top: float
    side: float


class Drawn(NamedTuple):
    """Hold an image, the corners of its object in px (left, top, right, bottom) and the object's source."""

    image: Image.Image
    corners: tuple[float, ...]
    source: int


Draw = Callable[[np.random.Generator, str, int], Drawn]  # random numbers, split, number of the image


class ImageSet(NamedTuple):
    """Describe a set of images to `make`."""

    name: str
    format: int  # raised whenever the same arguments give other files, so that old sets are not reused
    classes: Sequence[str]  # the images are of each in turn
    attribution: str
    suffix: str
    options: dict[str, int]  # of the images' files, as Pillow calls them


def photo_strips(split: str, mode: str, size: int, base: int) -> Iterator[np.ndarray]:
    """Yield the split's own part of each photograph, [height, width, channels] from 0 to 255.

    Args:
        mode: L for one channel, RGB for three.
        size: side of an image in px; the photographs are enlarged as it is.
        base: side of an image that is not enlarged.
    """
    for photo in load_sample_images().images:
        strip = Image.fromarray(photo[:, COLUMNS[split]]).convert(mode)
        enlarged = [side * size // base for side in strip.size]
        bands = [band.convert("F").resize(enlarged, Image.Resampling.BILINEAR) for band in strip.split()]
        yield np.stack([np.asarray(band) for band in bands], axis=2)


def crop_photo(rng: np.random.Generator, photos: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Draw a square of `size` px from one of the photographs."""
    photo = photos[rng.integers(len(photos))]
    top, left = (rng.integers(length - size + 1) for length in photo.shape[:2])
    return photo[top : top + size, left : left + size]


def render(pattern: np.ndarray, box: Box, angle: float, size: int, base: int) -> np.ndarray:
    """Draw a pattern [n, n] turned by `angle` (radians) into its box on a black canvas [size, size].

    The box is in px of a canvas [base, base].
    """
    n = len(pattern)
    framed = np.zeros((n + 2, n + 2), np.float32)  # a rim of zeros, for the pattern to fade into
    framed[1:-1, 1:-1] = pattern
    step = n * base / (box.side * size)  # px of the pattern per px of the canvas
    cos, sin = step * math.cos(angle), step * math.sin(angle)
    x, y = ((corner + box.side / 2) * size / base for corner in (box.left, box.top))
    middle = n / 2 + 1
    canvas_to_pattern = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
    affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(framed).transform((size, size), affine, canvas_to_pattern, bilinear))


def to_bytes(canvas: np.ndarray) -> np.ndarray:
    """Round values from 0 to 1 to uint8; what is beyond is cut off."""
    return np.uint8(255 * canvas.clip(0, 1) + 0.5)


def write_chunk(
    root: Path, image_set: ImageSet, draw: Draw, seed: int, split: str, indices: range
) -> list[list[str | int]]:
    """Write images of a split below `root` and return their rows of boxes.csv."""
    rows: list[list[str | int]] = []
    for index in indices:
        # A generator for each image: it then depends on neither the workers nor the number of images.
        rng = np.random.default_rng((seed, SPLITS.index(split), index))
        image, corners, source = draw(rng, split, index)
        label = index % len(image_set.classes)  # so that even a tiny set has no empty class
        file = f"{split}/{image_set.classes[label]}/{index:06d}{image_set.suffix}"
        image.save(root / file, **image_set.options)
        rows.append([file, label, *(f"{corner:.3f}" for corner in corners), source])
    return rows


def build(root: Path, image_set: ImageSet, draw: Draw, arguments: dict[str, Any], workers: int) -> None:
    """Write the images of all splits, boxes.csv and ATTRIBUTION.txt into the empty directory `root`."""
    (root / "ATTRIBUTION.txt").write_text(image_set.attribution)
    # Ctrl-C reaches every process of a terminal; the parent alone answers it.
    pool = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        with open(root / "boxes.csv", "w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["file", "label", "left", "top", "right", "bottom", "source"])
            for split in SPLITS:
                count = arguments[split]
                for name in image_set.classes:
                    (root / split / name).mkdir(parents=True)
                chunks = [range(count)[start : start + CHUNK] for start in range(0, count, CHUNK)]
                write = functools.partial(write_chunk, root, image_set, draw, arguments["seed"], split)
                written = pool.map(write, chunks)
                with tqdm(total=count, desc=split, unit="img", leave=False, disable=None) as bar:
                    for rows in written:
                        table.writerows(rows)
                        bar.update(len(rows))
                print(f"{split}: {count} images", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)


class Parser(argparse.ArgumentParser):
    """Report an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def whole_number(least: int, step: int = 1) -> Callable[[str], int]:
    """Return a type for argparse: multiples of `step` from `least` up."""

    def convert(text: str) -> int:
        with suppress(ValueError):
            value = int(text)
            if value >= least and value % step == 0:
                return value
        of = f", a multiple of {step}" if step > 1 else ""
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} up{of}")

    return convert


def make_parser(description: str, train: int, base: int) -> Parser:
    """Return a parser of what all sets take: output, images per split, seed, side in px, workers."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="directory to make")
    for split, count in (("train", train), ("val", 2000), ("test", 2000)):
        add(f"--{split}", type=whole_number(0), default=count, metavar="N", help=f"default {count}")
    add("--seed", type=whole_number(0), default=0, metavar="S", help="default 0")
    size_help = f"a multiple of {base}, default {base}"
    add("--size", type=whole_number(base, base), default=base, metavar="PX", help=size_help)
    add("--workers", type=whole_number(1), default=os.cpu_count(), metavar="N", help="default: all cores")
    return parser


def make(args: argparse.Namespace, image_set: ImageSet, start: Callable[[], Draw], *others: str) -> int:
    """Make a set in `args.output` and return the command's exit code; a set that is there is not made again.

    Args:
        args: of a `make_parser`.
        start: returns the function that draws an image; called only if the set has to be made.
        others: names of further arguments that the images depend on.
    """
    arguments = {name: getattr(args, name) for name in (*SPLITS, "seed", "size", *others)}
    record = json.dumps({"format": image_set.format, **arguments}, indent=2) + "\n"
    output = args.output.resolve()
    earlier = output / f"{image_set.name}.json"
    try:
        if earlier.is_file() and earlier.read_bytes() == record.encode():
            print(f"already there: {output}")
            return 0
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            print(f"{output} holds something else: remove it or give another --output", file=sys.stderr)
            return 2
        output.parent.mkdir(parents=True, exist_ok=True)
        draw = start()
        # Beside the output, so that one rename puts the finished set in place.
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
            unfinished = Path(scratch, output.name)
            unfinished.mkdir()
            build(unfinished, image_set, draw, arguments, args.workers)
            (unfinished / earlier.name).write_text(record)
            unfinished.rename(output)
    except OSError as error:
        print(f"cannot write {output} ({error}): give another --output", file=sys.stderr)
        return 1 if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0
