"""Read token labels, augment them with their images and turn them into targets for every patch token.

Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", NeurIPS 2021,
arXiv 2104.10858.

The label of an image is a tensor [2,T,G,G]: a strong classifier's scores of the T best classes in each cell
of a G x G grid on the whole image, then their class numbers. It is made once (scripts/make_token_labels.py)
and kept as a file. All augmentations but the random crop are applied to it too. The crop is recorded as a
box, which `token_targets` cuts out when it turns a batch of labels into distributions.
"""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms import functional as TF

from utils import InputError

# Operations of timm's RandAugment that move pixels: the label has to follow. The others change colours alone.
GEOMETRIC = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel"}
NEAREST = Image.Resampling.NEAREST
OUTSIDE = -1  # number of the cell where a geometric operation uncovers what is not in the picture

Pair = tuple[Image.Image, Image.Image]  # a picture and its `cell_picture`, after the same operations


# Files


def label_path(root: str | Path, image: str | Path) -> Path:
    """Return the file of an image's label: root / class folder / file name up to its first dot .pt."""
    image = Path(image)
    return Path(root) / image.parent.name / f"{image.name.split('.')[0]}.pt"


def load_label(path: str | Path, num_classes: int | None = None) -> Tensor:
    """Read a label without running any code that the file may hold.

    Args:
        path: a file of torch.save with a tensor [2,T,G,G] of any real type.
        num_classes: of the model; the class numbers have to be below it.

    Returns:
        [2,T,G,G] float32.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    remedy = "make the token labels of this data set with scripts/make_token_labels.py"
    if not Path(path).is_file():
        raise InputError(f"no token label at {path}: {remedy}")
    try:
        label = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a broken file
        raise InputError(f"{path} is not a tensor that can be read safely: remove it and {remedy}") from error
    shape = list(label.shape) if isinstance(label, Tensor) else []
    if len(shape) != 4 or shape[0] != 2 or shape[2] != shape[3] or 0 in shape:
        content = shape or f"a {type(label).__name__}"
        raise InputError(f"{path} holds {content}, not scores and classes [2,T,G,G]: remove it and {remedy}")
    label = label.float()
    scores, classes = label
    valid = (classes >= 0) & (classes == classes.floor()) & (classes < (num_classes or float("inf")))
    if not (scores.isfinite().all() and valid.all()):
        limit = f" from 0 to {num_classes - 1}" if num_classes else ""
        raise InputError(f"{path} holds other numbers than finite scores and classes{limit}: {remedy}")
    return label


# Augmentation of an image together with its label


def cell_picture(size: tuple[int, int], grid: int) -> Image.Image:
    """Make a picture of `size` (width, height) in which every pixel is the number, row-major, of its cell."""
    numbers = np.arange(grid**2, dtype=np.int32).reshape(grid, grid)
    return Image.fromarray(numbers).resize(size, NEAREST)


def follow(label: Tensor, cells: Image.Image) -> Tensor:
    """Move a label as its `cell_picture` was moved: each cell takes the label of the cell at its centre.

    Where the centre is outside of the original picture, all scores are 0 and the classes mean nothing.

    Args:
        label: [2,T,G,G].
    """
    centres = cells.resize((label.shape[-1],) * 2, NEAREST)
    source = torch.from_numpy(np.array(centres)).flatten()  # [G*G]
    moved = label.flatten(2)[:, :, source.clamp(min=0)]
    moved[0] *= source != OUTSIDE
    return moved.view_as(label)


def on_both(operation: Callable, geometric: bool, pair: Pair, *args: Any, **kwargs: Any) -> Pair:
    """Apply an operation of RandAugment, with its arguments drawn, to a picture and to its cells."""
    image, cells = pair
    if geometric:
        cells = operation(cells, *args, fillcolor=OUTSIDE, resample=NEAREST)
    return operation(image, *args, **kwargs), cells


def pair_policy(policy: RandAugment) -> RandAugment:
    """Make a policy work on a `Pair`; timm draws operations and arguments as it does for a picture."""
    for op in policy.ops:
        op.aug_fn = partial(on_both, op.aug_fn, op.name in GEOMETRIC)
    return policy


class PairedTransform:
    """Transform an image with its label for training, in the paper's order: flips, RandAugment, random crop.

    All choices and their distributions are those of timm's transform. Only the order differs, because the
    crop has to come last to be recorded.

    Args:
        img_size: side of the model input in pixels.
        config: `mean` and `std` of the channels; other keys are not read.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        auto_augment: a policy such as "rand-m9-mstd0.5-inc1", or None or "none".
        augmentation: further arguments of timm.data.create_transform (`scale`, `ratio`, `interpolation`,
            `re_prob`, `re_mode`, `re_count`, `color_jitter`).

    Raises:
        InputError: the policy is not RandAugment, or timm does not take an argument.
    """

    def __init__(
        self,
        img_size: int,
        config: dict[str, Any],
        hflip: float = 0.5,
        vflip: float = 0.0,
        auto_augment: str | None = None,
        **augmentation: Any,
    ):
        if auto_augment == "none":
            auto_augment = None
        if auto_augment and not auto_augment.startswith("rand-"):
            raise InputError(f"auto_augment is {auto_augment!r}: token labels can follow rand-... or none")
        self.hflip, self.vflip = hflip, vflip
        try:
            crop, augment, self.finish = create_transform(
                img_size,
                is_training=True,
                separate=True,
                hflip=0,
                vflip=0,
                auto_augment=auto_augment,
                **{key: config[key] for key in ("mean", "std")},
                **augmentation,
            )
            (self.crop,) = crop.transforms
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"cannot build the augmentation {auto_augment} {augmentation}: {type(error).__name__} {error}"
            ) from error
        self.augment = [pair_policy(t) if isinstance(t, RandAugment) else t for t in augment.transforms]

    def __call__(self, image: Image.Image, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Augment an image with its label.

        Args:
            image: RGB, of any size.
            label: [2,T,G,G].

        Returns:
            The model input [3,S,S], the label [2,T,G,G] of the augmented but uncropped image, and the crop
            [4]: left, top, width, height as shares of that image.
        """
        if torch.rand(()) < self.hflip:
            image, label = TF.hflip(image), label.flip(3)
        if torch.rand(()) < self.vflip:
            image, label = TF.vflip(image), label.flip(2)
        for transform in self.augment:
            if isinstance(transform, RandAugment):
                image, cells = transform((image, cell_picture(image.size, label.shape[-1])))
                label = follow(label, cells)
            else:
                image = transform(image)
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        box = torch.tensor([left, top, width, height]) / torch.tensor([*image.size, *image.size])
        modes = self.crop.interpolation  # one, or several to draw from
        mode = random.choice(modes) if isinstance(modes, tuple) else modes
        image = TF.resized_crop(image, top, left, height, width, self.crop.size, mode)
        return self.finish(image), label, box


# Targets of a batch


def crop_map(dense: Tensor, box: Tensor, side: int) -> Tensor:
    """Resample a box of every map to side x side cells (RoIAlign, He et al. 2017, arXiv 1703.06870).

    Args:
        dense: [B,C,G,G].
        box: [B,4] left, top, width, height as shares of the map.

    Returns:
        [B,C,side,side].
    """
    corners = torch.cat([box[:, :2], box[:, :2] + box[:, 2:]], dim=1)
    # RoIAlign counts from the centre of the first cell, boxes from its corner.
    corners = corners.to(dense.dtype) * dense.shape[-1] - 0.5
    index = torch.arange(len(box), device=box.device, dtype=dense.dtype)[:, None]
    return roi_align(dense, torch.cat([index, corners], dim=1), side)


def token_targets(label: Tensor, box: Tensor, num_classes: int, grid: int, smoothing: float = 0.1) -> Tensor:
    """Make distributions for the class token and for every patch token of a batch of crops.

    Classes that a label leaves out enter the softmax with score 0. Smoothing is the published one: every
    probability p becomes p (1 - s + s / K) + s / K, so that a distribution sums to 1 + s / K.

    Args:
        label: [B,2,T,G,G] from `PairedTransform`.
        box: [B,4] from `PairedTransform`.
        num_classes: K.
        grid: patches per side of the model input.
        smoothing: s, from 0 to 1.

    Returns:
        [B,K,1+grid*grid] float32: of the whole crop, then of its patches in raster order.
    """
    scores, classes = label[:, 0].float(), label[:, 1].long()  # [B,T,G,G]
    dense = scores.new_zeros(len(label), num_classes, *label.shape[-2:]).scatter_(1, classes, scores)
    cut = torch.cat([crop_map(dense, box, side).flatten(2) for side in (1, grid)], dim=2)
    off = smoothing / num_classes
    return cut.softmax(dim=1) * (1 - smoothing + off) + off
