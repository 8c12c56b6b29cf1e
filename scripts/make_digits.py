"""Make 'cluttered digits': small handwritten digits among fragments of digits, as an ImageFolder tree.

Every image shows one whole digit, its class, and one to three fragments on a dark photograph. Which of the
boxes holds the digit is drawn after they are laid out: neither place nor size tells it, a model has to look.
All sources come with scikit-learn; the splits share neither digits nor parts of a photograph.

    DIR/{train,val,test}/{0..9}/NNNNNN.png   RGB with three equal channels
    DIR/boxes.csv                            each file's label, its digit's box in px and index in load_digits
    DIR/digits.json                          the arguments; called again with the same ones, nothing is done
    DIR/ATTRIBUTION.txt                      whose works the sources are

The digits are scikit-learn's load_digits (UCI Optical Recognition of Handwritten Digits by E. Alpaydin and
C. Kaynak, CC BY 4.0), the photographs its sample images china.jpg and flower.jpg (CC BY 2.0).
"""

from __future__ import annotations

import _root as _root

import argparse
import csv
import errno
import functools
import itertools
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from tqdm import tqdm

FORMAT = 1  # raise it whenever the same arguments give other files, so that old sets are not reused
BASE = 56  # px; lengths in this file are those of a 56-px image, a larger one has them multiplied
CELL = 8  # px; boxes are laid on a grid of 7 x 7 cells
CHUNK = 250  # images per task of a worker
DIGITS = {"train": slice(0, 1100), "val": slice(1100, 1450), "test": slice(1450, 1797)}  # of a permutation
COLUMNS = {"train": slice(0, 320), "val": slice(320, 480), "test": slice(480, 640)}  # of both photographs

ATTRIBUTION = """\
The images of this data set are made from the works below. Changes: the digits were scaled, turned, cut up and
dimmed, the photographs turned grey, cropped and darkened, and noise was added.

Digits: Optical Recognition of Handwritten Digits by E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits,
CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/), as given by sklearn.datasets.load_digits.

Photographs, as given by sklearn.datasets.load_sample_images, which names these sources:
china.jpg by danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035/
flower.jpg by vultilion, https://www.flickr.com/photos/vultilion/6056698931/
both CC BY 2.0 (https://creativecommons.org/licenses/by/2.0/).
"""


def places(cells: int) -> list[frozenset[tuple[int, int]]]:
    """List where a box of `cells` x `cells` cells can lie, each place as the set of its (row, column)."""
    starts = itertools.product(range(BASE // CELL - cells + 1), repeat=2)
    offsets = list(itertools.product(range(cells), repeat=2))
    return [frozenset((row + down, column + right) for down, right in offsets) for row, column in starts]


PLACES = {16: places(2), 7: places(1)}  # by side of the box in px
DERANGEMENTS = [list(p) for p in itertools.permutations(range(4)) if all(i != j for i, j in enumerate(p))]
UPPER_HALF = np.repeat(np.float32([[1], [0]]), 4, axis=0).repeat(8, axis=1)  # [8, 8]


class Box(NamedTuple):
    """Give the place of a square, in px of a 56-px image."""

    left: float
    top: float
    side: int


class Sources(NamedTuple):
    """Hold the digits and photographs that the images of one split are made of."""

    digits: np.ndarray  # [n, 8, 8], ink from 0 to 1
    numbers: np.ndarray  # [n], the index of each in load_digits
    labels: np.ndarray  # [n]
    photos: list[np.ndarray]  # [height, width] each, grey from 0 to 0.25, enlarged as the images are


@functools.lru_cache(maxsize=1)
def load_sources(split: str, size: int) -> Sources:
    """Load the digits and the strips of photographs that are the split's own, for images of `size` px."""
    data = load_digits()
    numbers = np.random.RandomState(1234).permutation(len(data.images))[DIGITS[split]]
    photos = []
    for photo in load_sample_images().images:
        strip = Image.fromarray(photo[:, COLUMNS[split]]).convert("L").convert("F")
        enlarged = strip.resize([side * size // BASE for side in strip.size], Image.Resampling.BILINEAR)
        photos.append(np.asarray(enlarged) * np.float32(0.25 / 255))
    return Sources(np.float32(data.images[numbers] / 16), numbers, data.target[numbers], photos)


def lay_out(rng: np.random.Generator) -> list[Box]:
    """Draw 2 to 4 boxes in cells of their own, largest first.

    There is always a free place: a 2x2 box blocks at most 9 of the 36 places for another.
    """
    boxes = []
    taken: set[tuple[int, int]] = set()
    for small in sorted(rng.integers(2, size=rng.integers(2, 5))):
        side = 7 if small else 16
        free = [place for place in PLACES[side] if place.isdisjoint(taken)]
        place = free[rng.integers(len(free))]
        taken |= place
        corner = CELL * np.array(min(place)) + (-side % CELL / 2) + rng.uniform(-0.5, 0.5, size=2)
        # A 16-px box fills its cells: at the rim of the canvas half of the jitters would push it off.
        top, left = corner.clip(0, BASE - side).tolist()
        boxes.append(Box(left, top, side))
    return boxes


def draw_fragment(rng: np.random.Generator, digit: np.ndarray) -> np.ndarray:
    """Makes a digit [8, 8] into shuffled quarters [8, 8], a cut [5, 5] or a half [8, 8].

    Ink or border would give away each of the three kinds alone, but hardly their mix.
    """
    kind = rng.integers(3)
    if kind == 0:
        quarters = digit.reshape(2, 4, 2, 4).swapaxes(1, 2).reshape(4, 4, 4)
        shuffled = quarters[DERANGEMENTS[rng.integers(len(DERANGEMENTS))]]
        return shuffled.reshape(2, 2, 4, 4).swapaxes(1, 2).reshape(8, 8)
    if kind == 1:
        cuts = (digit[row : row + 5, column : column + 5] for row, column in rng.integers(4, size=(3, 2)))
        return max(cuts, key=np.sum)
    return digit * np.rot90(UPPER_HALF, rng.integers(4))


def render(pattern: np.ndarray, box: Box, angle: float, size: int) -> np.ndarray:
    """Draw a pattern [n, n] turned by `angle` (radians) into its box on a black canvas [size, size]."""
    n = len(pattern)
    framed = np.zeros((n + 2, n + 2), np.float32)  # a rim of zeros, for the pattern to fade into
    framed[1:-1, 1:-1] = pattern
    step = n * BASE / (box.side * size)  # px of the pattern per px of the canvas
    cos, sin = step * math.cos(angle), step * math.sin(angle)
    x, y = ((corner + box.side / 2) * size / BASE for corner in (box.left, box.top))
    middle = n / 2 + 1
    canvas_to_pattern = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
    affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(framed).transform((size, size), affine, canvas_to_pattern, bilinear))


def draw_image(
    rng: np.random.Generator, sources: Sources, label: int, size: int
) -> tuple[np.ndarray, Box, int]:
    """Draw an image that shows a digit of class `label`.

    Returns:
        The image [size, size] in uint8, the box of the digit and the digit's index in load_digits.
    """
    photo = sources.photos[rng.integers(len(sources.photos))]
    top, left = (rng.integers(length - size + 1) for length in photo.shape)
    canvas = photo[top : top + size, left : left + size]
    boxes = lay_out(rng)
    chosen = rng.integers(len(boxes))
    digit = rng.choice(np.flatnonzero(sources.labels == label))
    for i, box in enumerate(boxes):
        other = sources.digits[rng.integers(len(sources.digits))]
        pattern = sources.digits[digit] if i == chosen else draw_fragment(rng, other)
        amplitude, angle = rng.uniform(0.8, 1), math.radians(rng.uniform(-5, 5))
        canvas = np.maximum(canvas, render(amplitude * pattern, box, angle, size))
    canvas = canvas + np.float32(0.05) * rng.standard_normal(canvas.shape, np.float32)
    return np.uint8(255 * canvas.clip(0, 1) + 0.5), boxes[chosen], int(sources.numbers[digit])


def write_chunk(root: Path, split: str, seed: int, size: int, indices: range) -> list[list[str | int]]:
    """Write images of a split below `root` and returns their rows of boxes.csv."""
    sources = load_sources(split, size)
    rows: list[list[str | int]] = []
    for index in indices:
        # A generator for each image: it then depends on neither the workers nor the number of images.
        rng = np.random.default_rng((seed, list(DIGITS).index(split), index))
        label = index % 10  # in turn, so that even a tiny set has no empty class, which ImageFolder refuses
        image, box, source = draw_image(rng, sources, label, size)
        file = f"{split}/{label}/{index:06d}.png"
        Image.fromarray(image).convert("RGB").save(root / file, compress_level=1)
        corners = (box.left, box.top, box.left + box.side, box.top + box.side)
        rows.append([file, label, *(f"{corner * size / BASE:.3f}" for corner in corners), source])
    return rows


def build(root: Path, counts: dict[str, int], seed: int, size: int, workers: int) -> None:
    """Write the images of all splits, boxes.csv and ATTRIBUTION.txt into the empty directory `root`."""
    (root / "ATTRIBUTION.txt").write_text(ATTRIBUTION)
    # Ctrl-C reaches every process of a terminal; the parent alone answers it.
    pool = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        with open(root / "boxes.csv", "w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["file", "label", "left", "top", "right", "bottom", "source"])
            for split, count in counts.items():
                for label in range(10):
                    (root / split / str(label)).mkdir(parents=True)
                chunks = [range(count)[start : start + CHUNK] for start in range(0, count, CHUNK)]
                written = pool.map(functools.partial(write_chunk, root, split, seed, size), chunks)
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


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line; a bad one ends the program with code 2."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="directory to make")
    for split, count in (("train", 64000), ("val", 2000), ("test", 2000)):
        add(f"--{split}", type=whole_number(0), default=count, metavar="N", help=f"default {count}")
    add("--seed", type=whole_number(0), default=0, metavar="S", help="default 0")
    add(
        "--size",
        type=whole_number(BASE, BASE),
        default=BASE,
        metavar="PX",
        help="a multiple of 56, default 56",
    )
    add("--workers", type=whole_number(1), default=os.cpu_count(), metavar="N", help="default: all cores")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and returns its exit code."""
    args = parse_arguments(argv)
    counts = {split: getattr(args, split) for split in DIGITS}
    record = json.dumps({"format": FORMAT, **counts, "seed": args.seed, "size": args.size}, indent=2) + "\n"
    output = args.output.resolve()
    earlier = output / "digits.json"
    try:
        if earlier.is_file() and earlier.read_bytes() == record.encode():
            print(f"already there: {output}")
            return 0
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            print(f"{output} holds something else: remove it or give another --output", file=sys.stderr)
            return 2
        output.parent.mkdir(parents=True, exist_ok=True)
        # Beside the output, so that one rename puts the finished set in place.
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
            unfinished = Path(scratch, output.name)
            unfinished.mkdir()
            build(unfinished, counts, args.seed, args.size, args.workers)
            (unfinished / "digits.json").write_text(record)
            unfinished.rename(output)
    except OSError as error:
        print(f"cannot write {output} ({error}): give another --output", file=sys.stderr)
        return 1 if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
