"""Make 'garments in a scene': photographs of garments at any place and size, as an ImageFolder tree.

Every image shows one whole garment, its class, on a dark photograph, after up to four fragments of other
garments. Place and size are drawn freely, so that no grid of patches fits them. The splits share neither
garments nor parts of a photograph. With --colour, garment, fragments and photograph each have a colour of
their own: the garment may be as bright as what is behind it, and all three channels are needed to see it.

    DIR/{train,val,test}/CLASS/NNNNNN.jpg   grey, or RGB with --colour
    DIR/boxes.csv                           each file's label, its garment's box in px and index in the source
    DIR/garments.json                       the arguments; called again with the same ones, nothing is done
    DIR/ATTRIBUTION.txt                     whose works the sources are

The garments are Fashion-MNIST's (H. Xiao, K. Rasul and R. Vollgraf, Zalando SE, MIT licence), from --source,
else from Debian's package dataset-fashion-mnist, else downloaded by torchvision to fashion-mnist beside DIR.
In boxes.csv its test images are counted on from its training images. The photographs are scikit-learn's
sample images china.jpg and flower.jpg (CC BY 2.0).
"""

from __future__ import annotations

import _root as _root

import functools
import gzip
import hashlib
import math
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
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
    whole_number,
)
from PIL import Image

BASE = 112  # px; lengths in this file are those of a 112-px image, a larger one has them multiplied
SOURCE = 28  # px, side of a garment of Fashion-MNIST
FRAGMENT = 10  # px of a garment's 28
SHARE_VAL = 12  # one in so many training images of Fashion-MNIST is for val: 5,000 of 60,000
LIFT = 0.45  # brightness of a garment's darkest px, of its brightest one's
CLASSES = "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot".split()
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
# SHA-256 of what is in the files: Debian packs the published content anew, with another time in the header.
CHECKSUMS = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
NO_SOURCE = (
    "no Fashion-MNIST here: install Debian's package dataset-fashion-mnist or give the folder of its four "
    ".gz files with --source, or start this where torchvision can download it"
)

ATTRIBUTION = f"""\
The images of this data set are made from the works below. Changes: the garments were scaled, turned, cut up,
brightened and, in a set with colour, coloured; the photographs were cropped, darkened and turned grey or
coloured; noise was added.

Garments: Fashion-MNIST by Han Xiao, Kashif Rasul and Roland Vollgraf, Copyright (c) 2017 Zalando SE,
https://github.com/zalandoresearch/fashion-mnist, MIT License (https://opensource.org/license/mit):
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without
limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of
the Software, and to permit persons to whom the Software is furnished to do so, subject to the following
conditions: The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software. THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND,
EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR
PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

{PHOTOGRAPHS}"""


class SourceError(ValueError):
    """Fashion-MNIST is missing or damaged: one line with the way out."""


class Look(NamedTuple):
    """Hold what the images of a set have in common: side in px, range of the garments' sides, colour."""

    size: int
    sides: tuple[int, int]
    colour: bool


class Sources(NamedTuple):
    """Hold the garments and photographs that the images of one split are made of."""

    garments: np.ndarray  # [n, 28, 28] in uint8
    numbers: np.ndarray  # [n], the index of each in Fashion-MNIST
    of_class: list[np.ndarray]  # the index in `garments` of each garment of a class
    photos: list[np.ndarray]  # [height, width, channels] each, enlarged as the images are


# Fashion-MNIST


def check(path: Path) -> None:
    """Check the content of one of Fashion-MNIST's files.

    Raises:
        SourceError: it is damaged, or another file.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error):
        content = b""
    if hashlib.sha256(content).hexdigest() != CHECKSUMS[path.name]:
        raise SourceError(f"{path} is damaged or not Fashion-MNIST's: replace it")


def find_source(given: Path | None, cache: Path) -> Path:
    """Return the folder with Fashion-MNIST's files, which have the right content.

    Args:
        given: folder that the user names, if any.
        cache: folder for a download.

    Raises:
        SourceError: there is none, or a file is damaged.
    """
    downloaded = cache / "FashionMNIST" / "raw"  # as torchvision calls it
    places = [given] if given else [DEBIAN, downloaded]
    folder = next((place for place in places if all((place / name).is_file() for name in CHECKSUMS)), None)
    if given and folder is None:
        raise SourceError(f"--source {given} lacks one of {', '.join(CHECKSUMS)}")
    if folder is None:
        from torchvision.datasets import FashionMNIST  # takes seconds

        try:
            FashionMNIST(str(cache), download=True)
        except (OSError, RuntimeError) as error:
            raise SourceError(NO_SOURCE) from error
        folder = downloaded
    for name in CHECKSUMS:
        check(folder / name)
    return folder


def read_idx(path: Path, header: int) -> np.ndarray:
    """Return the bytes of a packed file after its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


@functools.lru_cache(maxsize=1)
def load_sources(folder: Path, split: str, size: int, colour: bool) -> Sources:
    """Load the garments and the strips of photographs that are the split's own, for images of `size` px."""
    parts = [read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 8) for part in ("train", "t10k")]
    pixels = [read_idx(folder / f"{part}-images-idx3-ubyte.gz", 16) for part in ("train", "t10k")]
    test = len(parts[0])
    val = test - test // SHARE_VAL
    own = {"train": slice(0, val), "val": slice(val, test), "test": slice(test, None)}[split]
    labels = np.concatenate(parts)[own]
    of_class = [np.flatnonzero(labels == label) for label in range(len(CLASSES))]
    photos = [strip / np.float32(255) for strip in photo_strips(split, "RGB" if colour else "L", size, BASE)]
    garments = np.concatenate(pixels).reshape(-1, SOURCE, SOURCE)[own]
    return Sources(garments, np.arange(test + len(parts[1]))[own], of_class, photos)


# Images


def draw_box(rng: np.random.Generator, sides: tuple[int, int], share: float = 1) -> Box:
    """Draw a box of any place, its side log-uniform in `sides` times `share`."""
    side = share * math.exp(rng.uniform(*map(math.log, sides)))
    left, top = rng.uniform(0, BASE - side, size=2).tolist()
    return Box(left, top, side)


def draw_fragment(rng: np.random.Generator, garment: np.ndarray) -> np.ndarray:
    """Cut the fullest of three random squares [10, 10] out of a garment [28, 28]."""
    corners = rng.integers(SOURCE - FRAGMENT + 1, size=(3, 2))
    return max((garment[y : y + FRAGMENT, x : x + FRAGMENT] for y, x in corners), key=np.sum)


def draw_tint(rng: np.random.Generator, channels: int) -> np.ndarray:
    """Draw how bright each channel is: the largest 0.8 to 1, the others of a colour from 0 up."""
    tint = rng.uniform(0, 1, size=channels)
    return np.float32(rng.uniform(0.8, 1) * tint / tint.max())


def paste(
    rng: np.random.Generator, canvas: np.ndarray, pattern: np.ndarray, box: Box, tint: np.ndarray
) -> None:
    """Lay a pattern [n, n] in uint8 on a canvas [size, size, channels] into the box, a little turned.

    A garment is 0 where nothing is, and light clothes are little more: they are lifted, so as to be seen.
    """
    enlarged = len(canvas) / BASE
    left, top, side = (enlarged * length for length in box)
    if math.ceil(side) < len(pattern):  # a reduction by sampling alone would leave rows out
        small = Image.fromarray(pattern).resize((math.ceil(side),) * 2, Image.Resampling.BILINEAR)
        pattern = np.asarray(small)
    angle = math.radians(rng.uniform(-5, 5))
    # Only a window is drawn: the box, the px in which the pattern fades, and what the turn adds (sin 5 / 2).
    margin = math.ceil(side / len(pattern) + 0.05 * side) + 1
    x, y, width = math.floor(left) - margin, math.floor(top) - margin, math.ceil(side) + 2 * margin + 1
    inner = Box(left - x, top - y, side)
    drawn = render(pattern / np.float32(255), inner, angle, width, width)[max(-y, 0) :, max(-x, 0) :, None]
    window = canvas[max(y, 0) : y + width, max(x, 0) : x + width]
    drawn = drawn[: window.shape[0], : window.shape[1]]
    opacity = (8 * drawn).clip(0, 1)
    window += opacity * (tint * (LIFT + (1 - LIFT) * drawn) - window)


def draw_image(
    rng: np.random.Generator, sources: Sources, garment: int, look: Look
) -> tuple[np.ndarray, Box]:
    """Draw an image that shows a garment of the sources.

    Returns:
        The image [size, size, channels] in uint8 and the box of the garment.
    """
    canvas = crop_photo(rng, sources.photos, look.size)
    channels = canvas.shape[2]
    behind, tint = (draw_tint(rng, channels) for _ in range(2))
    while look.colour and abs(tint - behind).max() < 0.5:
        tint = draw_tint(rng, channels)
    canvas = canvas * (0.7 * behind if look.colour else np.float32(0.25))
    for _ in range(rng.integers(5)):
        fragment = draw_fragment(rng, sources.garments[rng.integers(len(sources.garments))])
        box = draw_box(rng, look.sides, FRAGMENT / SOURCE)
        paste(rng, canvas, fragment, box, draw_tint(rng, channels))
    box = draw_box(rng, look.sides)
    paste(rng, canvas, sources.garments[garment], box, tint)
    return to_bytes(canvas + np.float32(0.03) * rng.standard_normal(canvas.shape, np.float32)), box


def draw_numbered(folder: Path, look: Look, rng: np.random.Generator, split: str, index: int) -> Drawn:
    """Draw the image of a number, see `_image_set.write_chunk`.

    No garment comes again before all of its class have come.
    """
    sources = load_sources(folder, split, look.size, look.colour)
    turn, label = divmod(index, len(CLASSES))
    garment = sources.of_class[label][turn % len(sources.of_class[label])]
    image, box = draw_image(rng, sources, garment, look)
    corners = (box.left, box.top, box.left + box.side, box.top + box.side)
    corners = tuple(corner * look.size / BASE for corner in corners)
    return Drawn(Image.fromarray(image.squeeze()), corners, int(sources.numbers[garment]))


# Command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = make_parser(__doc__, 48000, BASE)
    add = parser.add_argument
    add("--colour", action="store_true", help="a colour for the garment, each fragment and the photograph")
    sides_help = "range of the garments' sides, of 112; default 28 56"
    add("--sides", type=whole_number(7), nargs=2, default=[28, 56], metavar="PX", help=sides_help)
    add("--source", type=Path, metavar="DIR", help="folder with Fashion-MNIST's four .gz files")
    args = parser.parse_args(argv)
    if not args.sides[0] <= args.sides[1] <= BASE:
        parser.error(f"--sides {args.sides[0]} {args.sides[1]}: take two, the smaller first, up to {BASE}")
    look = Look(args.size, tuple(args.sides), args.colour)
    cache = args.output.resolve().parent / "fashion-mnist"
    garments = ImageSet(
        "garments",
        1,
        [f"{label}_{name}" for label, name in enumerate(CLASSES)],
        ATTRIBUTION,
        ".jpg",
        {"quality": 92, "subsampling": 0},
    )

    def start() -> functools.partial[Drawn]:
        return functools.partial(draw_numbered, find_source(args.source, cache).resolve(), look)

    try:
        return make(args, garments, start, "sides", "colour")
    except SourceError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
