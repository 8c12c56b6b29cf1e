"""EViT: some blocks keep the patches that the class token attends to and drop the rest, or fuse it into one
token.

Liang, Ge, Tong, Song, Wang, Xie, "Not All Patches are What You Need: Expediting Vision Transformers via Token
Reorganizations", ICLR 2022, arXiv 2202.07800.
"""

import math
from collections.abc import Callable, Sequence

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import register_model
from torch import Tensor, nn

from models.selection import original_patches, take, top_patches
from models.vit import NANO, AdaptiveViT, StageOutput, build


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
        drop_loc: numbers of the dropping blocks, from 0.
        fuse_token: whether dropped patches are fused.
        distilled: whether there is a distillation token.
        shrink_start_epoch: before this epoch training drops nothing.
        shrink_epochs: epochs in which the rate then falls from 1 to `keep_rate`, as half a cosine.

    Attributes:
        keep_rate: the rate in use, which may be set at any time: a rate below 1 takes the place of the
            constructor's, 1 disables dropping.

    Raises:
        ValueError: the rate, a block number or an epoch is out of range.
    """

    knobs = ("keep_rate",)

    def __init__(
        self,
        keep_rate: float = 0.7,
        drop_loc: int | Sequence[int] = (3, 6, 9),
        fuse_token: bool = False,
        distilled: bool = False,
        shrink_start_epoch: float = 0,
        shrink_epochs: float = 0,
        **vit,
    ):
        if min(shrink_start_epoch, shrink_epochs) < 0:
            raise ValueError(
                f"shrink_start_epoch {shrink_start_epoch}, shrink_epochs {shrink_epochs}: take 0 or more"
            )
        self.num_prefix_tokens = 1 + distilled  # read by make_pos_embed, which the base constructor calls
        super().__init__(**vit)
        blocks = [drop_loc] if isinstance(drop_loc, int) else list(drop_loc)
        depth = len(self.blocks)
        if not all(isinstance(i, int) and 0 <= i < depth for i in blocks) or len(set(blocks)) < len(blocks):
            raise ValueError(f"drop_loc is {drop_loc}: take different block numbers from 0 to {depth - 1}")
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
            raise ValueError(f"keep_rate is {rate}: take a share in (0, 1]")
        self.rate = rate
        # A compiled stage reads these whole numbers and not the rate: it makes whole numbers that change
        # symbols, so that a moving rate does not compile it anew, and a float a constant.
        self.kept_per_block = self.count_kept((self.img_size // self.patch_size) ** 2)

    def count_kept(self, n: int) -> list[int]:
        """How many slots each block keeps of what enters it when `n` patches enter the first; 0 for no
        drop."""
        kept = []
        for i in range(len(self.blocks)):
            k = math.ceil(self.rate * n) if i in self.drop_loc and self.base_keep_rate < 1 else n
            kept.append(k if k < n else 0)
            n = k + self.fuse_token if k < n else n
        return kept

    def check_images(self, images: Tensor) -> None:
        height, width = images.shape[-2:] if images.ndim == 4 else (0, 1)
        if height != width or height % self.patch_size:
            raise ValueError(
                f"images are {tuple(images.shape)}, expected [B,3,S,S], S a multiple of {self.patch_size}"
            )

    def set_epoch(self, epoch: float) -> None:
        start, base = self.shrink_start_epoch, self.base_keep_rate
        if epoch < start:
            self.keep_rate = 1.0
        elif epoch >= start + self.shrink_epochs:
            self.keep_rate = base
        else:
            self.keep_rate = (
                base + (1 - base) * (1 + math.cos(math.pi * (epoch - start) / self.shrink_epochs)) / 2
            )

    def schedules(self) -> dict[str, float]:
        return {"keep_rate": self.keep_rate}

    def stage(self, k: int, images: Tensor, prev: dict[str, Tensor]) -> StageOutput:
        """The only stage. Its info: `kept_<i>` [B,n] for every block i that dropped, the kept slots of those
        that entered it, best first; an earlier fused token is the last slot. Distilled training:
        `dist_logits` [B,K]."""
        self.check_images(images)
        x, prefix, info = self.embed(images), self.num_prefix_tokens, {}
        usual = images.shape[-1] == self.img_size
        counts = self.kept_per_block if usual else self.count_kept(x.shape[1] - prefix)
        for i, (block, kept) in enumerate(zip(self.blocks, counts, strict=True)):
            if kept == 0:
                x = block(x)
                continue
            x, scores = block.attend(x, need="cls")
            x, info[f"kept_{i}"] = self.reorganise(x, scores[:, prefix - 1 :], kept)
            x = block.feed(x)
        x = self.norm(x[:, :prefix])
        logits = self.head(x[:, 0])
        if prefix == 2:
            distilled = self.head_dist(x[:, 1])
            if self.training:
                info["dist_logits"] = distilled
            else:
                logits = (logits + distilled) / 2
        return StageOutput(logits, info)

    def embed(self, images: Tensor) -> Tensor:
        """All tokens with their positions, [B,N,C]."""
        x, prefix = self.patch_embed(images), [self.cls_token]
        if self.num_prefix_tokens == 2:
            prefix.append(self.dist_token)
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1)
        if x.shape[1] == self.pos_embed.shape[1]:
            return x + self.pos_embed
        side = images.shape[-1] // self.patch_size
        return x + resample_abs_pos_embed(
            self.pos_embed, [side, side], num_prefix_tokens=self.num_prefix_tokens, antialias=False
        )

    def reorganise(self, x: Tensor, scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        """Prefix tokens, the `kept` patches of x [B,N,C] with the highest scores [B,n], the fused token if
        any."""
        prefix, patches = x.tensor_split([self.num_prefix_tokens], dim=1)
        order = top_patches(scores, scores.shape[1])
        best, rest = order.tensor_split([kept], dim=1)
        parts = [prefix, take(patches, best)]
        if self.fuse_token:
            # [B,1,n-kept]; not normalised, in the original
            weights = scores.gather(1, rest)[:, None].to(x.dtype)
            parts.append(weights @ take(patches, rest))
        return torch.cat(parts, dim=1), best

    def kept_patches(self, info: dict[str, Tensor]) -> list[Tensor]:
        kept = [info[f"kept_{i}"] for i in sorted(self.drop_loc) if f"kept_{i}" in info]
        return original_patches(kept, self.fuse_token)

    def loss(
        self, outputs: list[StageOutput], target: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Distilled without a teacher: both heads learn the target, with equal weight."""
        logits, info = outputs[0]
        if "dist_logits" not in info:
            return {"ce": criterion(logits, target)}
        return {"ce": criterion(logits, target) / 2, "dist_ce": criterion(info["dist_logits"], target) / 2}


SMALL = dict(embed_dim=384, num_heads=6)
BASE = dict(embed_dim=768, num_heads=12)
# At a depth of 4 instead of 12, after the same quarters.
NANO_EVIT = NANO | dict(img_size=56, drop_loc=(1, 2, 3))


def make(defaults: dict, kwargs: dict) -> EViT:
    """Builds with the published spelling of the rate, `base_keep_rate`, allowed."""
    if "base_keep_rate" in kwargs:
        kwargs["keep_rate"] = kwargs.pop("base_keep_rate")
    return build(EViT, defaults, kwargs)


@register_model
def evit_deit_small(pretrained: bool = False, **kwargs) -> EViT:
    """EViT on DeiT-S."""
    return make(SMALL, {"pretrained": pretrained, **kwargs})


@register_model
def evit_deit_base(pretrained: bool = False, **kwargs) -> EViT:
    """EViT on DeiT-B."""
    return make(BASE, {"pretrained": pretrained, **kwargs})


@register_model
def evit_deit_small_distilled(pretrained: bool = False, **kwargs) -> EViT:
    """EViT on DeiT-S with a distillation token."""
    return make(SMALL | {"distilled": True}, {"pretrained": pretrained, **kwargs})


@register_model
def evit_deit_base_distilled(pretrained: bool = False, **kwargs) -> EViT:
    """EViT on DeiT-B with a distillation token."""
    return make(BASE | {"distilled": True}, {"pretrained": pretrained, **kwargs})


@register_model
def evit_deit_nano(pretrained: bool = False, **kwargs) -> EViT:
    """EViT at the size of the embedded data set."""
    return make(NANO_EVIT, {"pretrained": pretrained, **kwargs})


def register_published(name: str, **defaults) -> None:
    """Registers one of the published names, which differ in their defaults only."""

    def published(pretrained: bool = False, **kwargs) -> EViT:
        return make(defaults, {"pretrained": pretrained, **kwargs})

    published.__name__ = name
    published.__doc__ = f"EViT under its published name {name}."
    published.__module__ = __name__
    register_model(published)


register_published("deit_small_patch16_shrink_base", **SMALL)
register_published("deit_base_patch16_shrink_base", **BASE)
register_published("deit_small_patch16_224_shrink_base", **SMALL)
register_published("deit_small_patch16_224_shrink", **SMALL)
register_published("deit_small_patch16_224_shrink05", **SMALL, keep_rate=0.5)
register_published("deit_small_patch16_272_shrink", **SMALL, img_size=272)
register_published("deit_small_patch16_288_shrink06", **SMALL, img_size=288, keep_rate=0.6)
register_published("deit_small_patch16_304_shrink05", **SMALL, img_size=304, keep_rate=0.5)
