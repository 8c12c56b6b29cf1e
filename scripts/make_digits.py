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

import functools
import itertools
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from _image_set import (
    PHOTOGRAPHS,
    Box,
    Drawn,
    ImageSet,
    crop_photo,
    make,
    make_parser,
    photo_strips,
    render,
    to_bytes,
)
from PIL import Image
from sklearn.datasets import load_digits

BASE = 56  # px; lengths in this file are those of a 56-px image, a larger one has them multiplied
CELL = 8  # px; boxes are laid on a grid of 7 x 7 cells
DIGITS = {"train": slice(0, 1100), "val": slice(1100, 1450), "test": slice(1450, 1797)}  # of a permutation

ATTRIBUTION = f"""\
The images of this data set are made from the works below. Changes: the digits were scaled, turned, cut up and
dimmed, the photographs turned grey, cropped and darkened, and noise was added.

Digits: Optical Recognition of Handwritten Digits by E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits,
CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/), as given by sklearn.datasets.load_digits.

{PHOTOGRAPHS}"""


def places(cells: int) -> list[frozenset[tuple[int, int]]]:
    """List where a box of `cells` x `cells` cells can lie, each place as the set of its (row, column)."""
    starts = itertools.product(range(BASE // CELL - cells + 1), repeat=2)
    offsets = list(itertools.product(range(cells), repeat=2))
    return [frozenset((row + down, column + right) for down, right in offsets) for row, column in starts]


PLACES = {16: places(2), 7: places(1)}  # by side of the box in px
DERANGEMENTS = [list(p) for p in itertools.permutations(range(4)) if all(i != j for i, j in enumerate(p))]
UPPER_HALF = np.repeat(np.float32([[1], [0]]), 4, axis=0).repeat(8, axis=1)  # [8, 8]


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
    photos = [photo[..., 0] * np.float32(0.25 / 255) for photo in photo_strips(split, "L", size, BASE)]
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


def draw_image(
    rng: np.random.Generator, sources: Sources, label: int, size: int
) -> tuple[np.ndarray, Box, int]:
    """Draw an image that shows a digit of class `label`.

    Returns:
        The image [size, size] in uint8, the box of the digit and the digit's index in load_digits.
    """
    canvas = crop_photo(rng, sources.photos, size)
    boxes = lay_out(rng)
    chosen = rng.integers(len(boxes))
    digit = rng.choice(np.flatnonzero(sources.labels == label))
    for i, box in enumerate(boxes):
        other = sources.digits[rng.integers(len(sources.digits))]
        pattern = sources.digits[digit] if i == chosen else draw_fragment(rng, other)
        amplitude, angle = rng.uniform(0.8, 1), math.radians(rng.uniform(-5, 5))
        canvas = np.maximum(canvas, render(amplitude * pattern, box, angle, size, BASE))
    canvas = canvas + np.float32(0.05) * rng.standard_normal(canvas.shape, np.float32)
    return to_bytes(canvas), boxes[chosen], int(sources.numbers[digit])


def draw_numbered(size: int, rng: np.random.Generator, split: str, index: int) -> Drawn:
    """Draw the image of a number, see `_image_set.write_chunk`."""
    image, box, source = draw_image(rng, load_sources(split, size), index % 10, size)
    corners = (box.left, box.top, box.left + box.side, box.top + box.side)
    return Drawn(Image.fromarray(image).convert("RGB"), tuple(c * size / BASE for c in corners), source)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and returns its exit code."""
    args = make_parser(__doc__, 64000, BASE).parse_args(argv)
    digits = ImageSet("digits", 1, "0123456789", ATTRIBUTION, ".png", {"compress_level": 1})
    return make(args, digits, lambda: functools.partial(draw_numbered, args.size))


if __name__ == "__main__":
    sys.exit(main())
