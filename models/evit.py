"""EViT: some blocks keep the patches that the class token attends to and drop the rest, or fuse it into one
token.

Liang, Ge, Tong, Song, Wang, Xie, "Not All Patches are What You Need: Expediting Vision Transformers via Token
Reorganizations", ICLR 2022, arXiv 2202.07800.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from models.registry import build, register, register_reducer
from models.selection import original_patches, take, top_patches
from models.vit import NANO, AdaptiveViT, Block, Flag, Knob, Picture, StageOutput
from utils import InputError


def block_numbers(text: str) -> list[int]:
    """Read "3,6,9", "(3, 6, 9)" or "3"; nothing is evaluated."""
    try:
        return [int(number) for number in text.strip(" ()[]").rstrip(",").split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of block numbers such as 3,6,9") from error


class EViT(AdaptiveViT):
    """Plain ViT, except:

    - blocks `drop_loc` keep ceil(keep_rate * n) of the n patches that enter them: those with the highest
      class attention, mean over heads, in descending order (section 3.2);
    - the drop is between attention and MLP;
    - with `fuse_token` the dropped patches become one more token, their sum weighted by the attention they
      got (section 3.2, equation 2);
    - position embeddings are resampled where the images have another size;
    - `distilled` adds DeiT's distillation token and head (Touvron et al. 2021, section 4), never dropped.
      Training gives both heads' logits, evaluation their mean.

    Args:
        keep_rate: share of the patches that each dropping block keeps, in (0, 1]; 1 drops nothing, ever.
        drop_loc: numbers of the dropping blocks, from 0; default: after each quarter, as published.
        fuse_token: whether dropped patches are fused.
        distilled: whether there is a distillation token.
        shrink_start_epoch: before this epoch training drops nothing.
        shrink_epochs: epochs in which the rate then falls from 1 to `keep_rate`, as half a cosine.

    Attributes:
        keep_rate: the rate in use, which may be set at any time: a rate below 1 takes the place of the
            constructor's, 1 disables dropping.

    Raises:
        InputError: the rate, a block number or an epoch is out of range.
    """

    knobs = {"keep_rate": Knob(float, 0.05, 1.0)}
    flags = (
        Flag("--keep_rate --base_keep_rate", "EViT: share of the patches that each dropping block keeps"),
        Flag("--drop_loc", "EViT: numbers of the dropping blocks, from 0, as 3,6,9", block_numbers),
        Flag("--fuse_token", "EViT: fuse dropped patches into one token", bool),
        Flag(
            "--shrink_start_epoch", "EViT: epoch from which training drops patches; default: from the first"
        ),
        Flag("--shrink_epochs", "EViT: epochs in which the keep rate then falls; default: at once"),
    )

    def __init__(
        self,
        keep_rate: float = 0.7,
        drop_loc: int | Sequence[int] | None = None,
        fuse_token: bool = False,
        distilled: bool = False,
        shrink_start_epoch: float = 0,
        shrink_epochs: float = 0,
        **vit,
    ):
        if min(shrink_start_epoch, shrink_epochs) < 0:
            raise InputError(
                f"shrink_start_epoch {shrink_start_epoch}, shrink_epochs {shrink_epochs}: take 0 or more"
            )
        self.num_prefix_tokens = 1 + distilled  # read by make_pos_embed, which the base constructor calls
        super().__init__(**vit)
        depth = len(self.blocks)
        drop_loc = [depth * quarter // 4 for quarter in (1, 2, 3)] if drop_loc is None else drop_loc
        blocks = [drop_loc] if isinstance(drop_loc, int) else list(drop_loc)
        if not all(isinstance(i, int) and 0 <= i < depth for i in blocks) or len(set(blocks)) < len(blocks):
            raise InputError(f"drop_loc is {drop_loc}: take different block numbers from 0 to {depth - 1}")
        self.drop_loc, self.fuse_token = frozenset(blocks), fuse_token
        self.base_keep_rate = keep_rate
        self.keep_rate = keep_rate
        self.shrink_start_epoch, self.shrink_epochs = shrink_start_epoch, shrink_epochs
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
            self.head_dist = nn.Linear(self.embed_dim, self.num_classes)

    @property
    def keep_rate(self) -> float:
        return self.rate

    @keep_rate.setter
    def keep_rate(self, rate: float) -> None:
        if not 0 < rate <= 1:
            raise InputError(f"keep_rate is {rate}: take a share in (0, 1]")
        self.rate = rate
        # A compiled stage reads these whole numbers and not the rate: it makes whole numbers that change
        # symbols, so that a moving rate does not compile it anew, and a float a constant.
        self.entering, self.kept_per_block = [], []
        n = (self.img_size // self.patch_size) ** 2
        for i in range(len(self.blocks)):
            self.entering.append(n)
            self.kept_per_block.append(self.count_kept(i, n))
            n = self.kept_per_block[i] + self.fuse_token if self.kept_per_block[i] else n

    def count_kept(self, i: int, n: int) -> int:
        """Count the slots that block `i` keeps of `n` patches; 0 where it drops none."""
        kept = math.ceil(self.rate * n) if i in self.drop_loc and self.base_keep_rate < 1 else n
        return kept if kept < n else 0

    def check_images(self, images: Tensor) -> None:
        height, width = images.shape[-2:] if images.ndim == 4 else (0, 1)
        if height != width or height % self.patch_size:
            raise ValueError(
                f"images are {tuple(images.shape)}, expected [B,3,S,S], S a multiple of {self.patch_size}"
            )

    def set_epoch(self, epoch: float) -> None:
        super().set_epoch(epoch)
        start, base = self.shrink_start_epoch, self.base_keep_rate
        if epoch < start:
            self.keep_rate = 1.0
        elif epoch >= start + self.shrink_epochs:
            self.keep_rate = base
        else:
            self.keep_rate = (
                base + (1 - base) * (1 + math.cos(math.pi * (epoch - start) / self.shrink_epochs)) / 2
            )

    def prefix_tokens(self) -> list[Tensor]:
        return [self.cls_token] if self.num_prefix_tokens == 1 else [self.cls_token, self.dist_token]

    def positions(self, patches: int) -> Tensor:
        prefix, side = self.num_prefix_tokens, math.isqrt(patches)
        if patches + prefix == self.pos_embed.shape[1]:
            return self.pos_embed
        return resample_abs_pos_embed(self.pos_embed, [side, side], num_prefix_tokens=prefix, antialias=False)

    def reduce(self, x: Tensor, block: Block, i: int, info: dict[str, Tensor]) -> Tensor:
        """Run a block; where it drops, it adds `kept_<i>` [B,n] to the info.

        These are the kept slots of those that entered the block, best first; an earlier fused token is the
        last slot.
        """
        prefix = self.num_prefix_tokens
        n = x.shape[1] - prefix
        kept = self.kept_per_block[i] if n == self.entering[i] else self.count_kept(i, n)
        if kept == 0:
            return block(x)
        x, scores = block.attend(x, need="cls")
        x, best = self.reorganise(x, scores[:, prefix - 1 :], kept)
        info[f"kept_{i}"] = best
        if "places" in info:  # a fused token stands nowhere
            first = torch.arange(prefix, device=x.device).expand(x.shape[0], -1)
            slots = torch.cat([first, prefix + best], dim=1)
            info["places"] = F.pad(info["places"].gather(1, slots), (0, int(self.fuse_token)), value=-1)
        return block.feed(x)

    def read_out(self, x: Tensor, info: dict[str, Tensor]) -> StageOutput:
        """Return the logits; distilled training adds `dist_logits` [B,K] to the info."""
        if self.num_prefix_tokens == 1:
            return super().read_out(x, info)
        x = self.norm(x[:, :2])
        logits, distilled = self.head(x[:, 0]), self.head_dist(x[:, 1])
        if self.training:
            return StageOutput(logits, info | {"dist_logits": distilled})
        return StageOutput((logits + distilled) / 2, info)

    def reorganise(self, x: Tensor, scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        """Keep the prefix tokens of x [B,N,C] and the `kept` patches with the highest scores [B,n].

        With `fuse_token` one token follows them. The kept slots [B,kept] are returned as well.
        """
        prefix, patches = x.tensor_split([self.num_prefix_tokens], dim=1)
        order = top_patches(scores, scores.shape[1])
        best, rest = order.tensor_split([kept], dim=1)
        parts = [prefix, take(patches, best)]
        if self.fuse_token:
            weights = scores.gather(1, rest)[:, None].to(x.dtype)  # [B,1,n-kept], not normalised
            parts.append(weights @ take(patches, rest))
        return torch.cat(parts, dim=1), best

    def picture(self, info: dict[str, Tensor]) -> Picture:
        kept = [info[f"kept_{i}"] for i in sorted(self.drop_loc) if f"kept_{i}" in info]
        return super().picture(info)._replace(kept=tuple(original_patches(kept, self.fuse_token)))

    def loss(
        self, outputs: list[StageOutput], target: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Return the loss; the distilled model has no teacher, and both heads learn the target alike."""
        logits, info = outputs[0]
        if "dist_logits" not in info:
            return {"ce": criterion(logits, target)}
        return {"ce": criterion(logits, target) / 2, "dist_ce": criterion(info["dist_logits"], target) / 2}


SMALL = dict(embed_dim=384, num_heads=6)
BASE = dict(embed_dim=768, num_heads=12)


def make(defaults: dict[str, Any], kwargs: dict[str, Any]) -> EViT:
    """Build with the published spelling of the rate, `base_keep_rate`, allowed."""
    if {"base_keep_rate", "keep_rate"} <= kwargs.keys():
        raise InputError("keep_rate and base_keep_rate are one argument: give one of them")
    if "base_keep_rate" in kwargs:
        kwargs["keep_rate"] = kwargs.pop("base_keep_rate")
    return build(EViT, defaults, kwargs)


def register_evit(names: str, text: str, **defaults: Any) -> None:
    """Register a size of the model under its names."""
    register(names, EViT, text, make, **defaults)


register_reducer("evit", EViT)
aliases = "deit_small_patch16_shrink_base deit_small_patch16_224_shrink_base deit_small_patch16_224_shrink"
register_evit(f"evit_deit_small {aliases}", "EViT on DeiT-S.", **SMALL)
register_evit("evit_deit_base deit_base_patch16_shrink_base", "EViT on DeiT-B.", **BASE)
register_evit("evit_deit_small_distilled", "EViT on DeiT-S, distillation token.", **SMALL, distilled=True)
register_evit("evit_deit_base_distilled", "EViT on DeiT-B, distillation token.", **BASE, distilled=True)
register_evit("evit_deit_nano", "EViT at the size of the embedded data set.", **NANO, img_size=56)
# Published names that differ in their defaults.
register_evit("deit_small_patch16_224_shrink05", "EViT on DeiT-S, half kept.", **SMALL, keep_rate=0.5)
register_evit("deit_small_patch16_272_shrink", "EViT on DeiT-S, 272 pixels.", **SMALL, img_size=272)
text = "EViT on DeiT-S, larger images."
register_evit("deit_small_patch16_288_shrink06", text, **SMALL, img_size=288, keep_rate=0.6)
register_evit("deit_small_patch16_304_shrink05", text, **SMALL, img_size=304, keep_rate=0.5)
