"""CF-ViT on LV-ViT: a convolutional stem, a second head on every token, and mixing of patches in training.

Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", NeurIPS 2021,
arXiv 2104.10858 (LV-ViT); Chen et al. 2023, arXiv 2203.03821 (CF-ViT).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.cf_vit import CFViT
from models.registry import register
from models.selection import refine, take
from models.vit import NANO, AdaptiveViT, Flag, StageOutput
from utils import InputError


class Stem(nn.Module):
    """Three convolutions with batch norm at half resolution, then one that makes the patches."""

    def __init__(self, patch_size: int, embed_dim: int, width: int):
        super().__init__()
        if patch_size % 2:
            raise InputError(f"patch_size is {patch_size}: the stem halves the image, take an even one")
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.proj = nn.Conv2d(width, embed_dim, patch_size // 2, stride=patch_size // 2)

    def forward(self, images: Tensor) -> Tensor:
        """[B,3,S,S] to [B,P,C]."""
        x = self.bn1(self.conv1(images)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.bn3(self.conv3(x)).relu()
        return self.proj(x).flatten(2).transpose(1, 2)


def draw_box(side: int, device: torch.device) -> Tensor:
    """Draw a random box on a grid, [4] int64: first row, first column, last row + 1, last column + 1.

    Its area is about 1 - lambda of the grid's with lambda uniform in (0, 1), as in CutMix with alpha 1.
    """
    half = (side * torch.rand((), device=device).sqrt()).long() // 2  # 1 - lambda is uniform as well
    centre = torch.randint(side, (2,), device=device)
    return torch.cat([centre - half, centre + half]).clamp(0, side)


def mix(x: Tensor, box: Tensor, side: int) -> Tensor:
    """Replace the patches inside the box by those of the reversed batch; doing it twice changes nothing.

    Args:
        x: [B,side*side,C].
        box: [4], see `draw_box`, on the grid of this side.
    """
    at = torch.arange(side, device=x.device)
    rows, columns = (at >= box[0]) & (at < box[2]), (at >= box[1]) & (at < box[3])
    inside = (rows[:, None] & columns).flatten()[:, None]  # [side*side,1]
    return torch.where(inside, x.flip(0), x)


class CFLVViT(CFViT):
    """CF-ViT on LV-ViT:

    - a convolutional stem instead of one convolution: all fine patches are embedded before some are taken;
    - `aux_head` classifies every patch token; in evaluation a quarter of the best patch's logits is added to
      the class token's. Stage 0 divides the sum by 1.25 and stage 1 does not, as in the published code: the
      argmax is the same, but confidences of the two stages are not comparable;
    - in training both stages mix the same area of the image with the reversed batch (mix token), and `info`
      also holds `aux` [B,P,K] for the full grid of the stage, with every token's logits back at its own
      image.

    Args:
        mix_token: whether training mixes patches.
        dense_weight: weight of the patch tokens' loss.
        stem_width: channels of the stem.
    """

    read = slice(None)
    token_labels = True
    flags = (
        *CFViT.flags,
        Flag("--dense-weight", "weight of the patch tokens' loss (LV-ViT: 1)", training=True),
    )
    recipe = {
        "select_from": 201 / 300,
        "lr": 1.6e-3,
        "unscale_lr": True,
        "cooldown_epochs": 10,
        "crop_pct": 0.9,
        "train_interpolation": "random",
        "mixup": 0.0,
        "cutmix": 0.0,
        "repeated_aug": False,
        "model_ema": False,
        "model_ema_decay": 0.99992,
        "eval_ema": True,
        "seed": 42,
    }

    def __init__(self, mix_token: bool = True, dense_weight: float = 1.0, stem_width: int = 64, **cf):
        self.stem_width = stem_width  # read by make_patch_embed, which the base constructor calls
        super().__init__(**cf)
        if type(self).reduce is not AdaptiveViT.reduce:
            raise InputError("this model takes no reducer: its loss is on every patch")
        self.mix_token, self.dense_weight = mix_token, dense_weight
        self.aux_head = nn.Linear(self.embed_dim, self.num_classes)

    def make_patch_embed(self) -> nn.Module:
        return Stem(self.patch_size, self.embed_dim, self.stem_width)

    def begin(self, images: Tensor) -> dict[str, Tensor]:
        if not (self.training and self.mix_token and images.shape[0]):
            return {}
        return {"mix_box": draw_box(self.stage_size, images.device).expand(images.shape[0], -1)}

    def embed_patches(self, images: Tensor, info: dict[str, Tensor], index: Tensor | None = None) -> Tensor:
        patches = self.patch_embed(images)
        if "mix_box" in info:
            scale = images.shape[-1] // (self.stage_size * self.patch_size)  # the box is on the coarse grid
            patches = mix(patches, scale * info["mix_box"][0], scale * self.stage_size)
        return patches if index is None else take(patches, index)

    def classify(
        self, k: int, x: Tensor, info: dict[str, Tensor], prev: dict[str, Tensor] | None = None
    ) -> StageOutput:
        logits, aux = self.head(x[:, 0]), self.aux_head(x[:, 1:])
        if not self.training:
            logits = logits + 0.25 * aux.amax(dim=1)
            return StageOutput(logits / 1.25 if k == 0 else logits, info)
        if k == 1:  # a patch that stayed coarse speaks for its four children
            place = torch.cat([info["kept"], refine(info["rest"], self.stage_size)], dim=1)
            fine = info["kept"].shape[1]
            aux = torch.cat([aux[:, :fine], aux[:, fine:].repeat(1, 4, 1)], dim=1)
            aux = take(aux, place.argsort(dim=1))
        shared = prev if k == 1 else info
        if "mix_box" in shared:
            box = shared["mix_box"]
            aux = mix(aux, (k + 1) * box[0], (k + 1) * self.stage_size)
            info = info | {"mix_box": box}
        return StageOutput(logits, info | {"aux": aux})

    def loss(
        self, outputs: list[StageOutput], target: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Return CF-ViT's loss with token labels on stage 1 (LV-ViT, section 3.2).

        Args:
            outputs: of both stages in training mode.
            target: class numbers [B], distributions [B,K], or token labels [B,K,1+P]: of the class token,
                then of the fine patches in raster order.
            criterion: from logits and target to a scalar.
        """
        tokens = None
        if target.ndim == 3:
            target, tokens = target[..., 0], target[..., 1:]
        terms = super().loss(outputs, target, criterion)
        if len(outputs) == 1:
            return terms
        logits, info = outputs[1]
        if "mix_box" in info:
            top, left, bottom, right = info["mix_box"][0]
            share = (bottom - top) * (right - left) / self.stage_size**2
            terms["fine_ce"] = (1 - share) * terms["fine_ce"] + share * criterion(logits, target.flip(0))
        aux = info["aux"]  # [B,P,K]
        if tokens is None:
            tokens = target.repeat_interleave(aux.shape[1], dim=0)
        else:
            tokens = tokens.transpose(1, 2).flatten(0, 1)
        terms["token_ce"] = self.dense_weight * criterion(aux.flatten(0, 1), tokens)
        return terms


LV = dict(mlp_ratio=3.0, qkv_bias=False, norm_eps=1e-5, residual_scale=2.0)


text = "CF-ViT on LV-ViT-S: 7x7 or 9x9 coarse grid, 224 or 288 pixels."
register("cf_lvvit_small", CFLVViT, text, **LV, depth=16, select_from_epoch=201)
text = "CF-ViT on LV-ViT at the size of the embedded data set: 7x7 coarse grid, 56 pixels."
register("cf_lvvit_nano", CFLVViT, text, **NANO, **LV, stem_width=16)
