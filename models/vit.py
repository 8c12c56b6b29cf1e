"""The vision transformer that every method here is made of, and the protocol that every method follows.

Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) in DeiT's form (Touvron et al. 2021, arXiv
2012.12877).
Letters: B batch, N tokens (class token first), P = N - 1 patches, C channels, H heads, K classes, L blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed, resample_abs_pos_embed, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn


class StageOutput(NamedTuple):
    """What one stage returns.

    Attributes:
        logits: [B,K].
        info: batch-first tensors that the next stage, the loss, the cost or a picture reads.
    """

    logits: Tensor
    info: dict[str, Tensor]


class Attention(nn.Module):
    """Multi-head self-attention on the fused kernel; the class token's row of the map on request.

    The row costs one query, O(N), so the [B,H,N,N] map never exists.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, need: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Attends.

        Args:
            x: [B,N,C].
            bias: added to the scaled logits before the softmax, broadcastable to [B,H,N,N].
            need: "cls" for the class token's attention to the patches.

        Returns:
            [B,N,C], and for "cls" [B,P]: softmax weights, mean over heads, float32.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B,H,N,d]
        row = self.class_row(q, k, bias) if need == "cls" else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).flatten(2)), row

    def class_row(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        """Attention of the class token to the patches, [B,P], from q and k [B,H,N,d]."""
        logits = (
            (self.scale * q[:, :, :1]) @ k.transpose(-2, -1)
        ).float()  # [B,H,1,N]; scaled first for fp16
        if bias is not None:
            logits = logits + bias[..., :1, :]
        return logits.softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)


class Block(nn.Module):
    """Pre-norm transformer block, cut at its only seam: `attend`, then `feed`.

    Args:
        residual_scale: both branches are divided by this (LV-ViT uses 2).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        residual_scale: float = 1.0,
    ):
        super().__init__()
        self.residual_scale = residual_scale
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def residual(self, x: Tensor, branch: Tensor) -> Tensor:
        branch = self.drop_path(branch)
        return x + (branch if self.residual_scale == 1 else branch / self.residual_scale)

    def attend(
        self, x: Tensor, bias: Tensor | None = None, need: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        out, extra = self.attn(self.norm1(x), bias, need)
        return self.residual(x, out), extra

    def feed(self, x: Tensor) -> Tensor:
        return self.residual(x, self.mlp(self.norm2(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.feed(self.attend(x)[0])


class Adaptive(nn.Module):
    """The protocol: a model is a chain of stages, each of which may be the last one an image sees.

    Attributes:
        num_exits: number of stages.
        stage_names: what the paper calls them.
        recipe: training options of the published recipe, as main_deit.py names them.
        token_labels: whether `loss` takes targets [B,K,1+P], one per patch of the full image.
        cost_varies: whether an image's cost depends on it; then `info["tokens"]` [B,L] says how many tokens
            entered each block.
        knobs: attributes that may be set after training to trade accuracy for cost.
        depth_shares: mean depths of tokens worth timing, as shares of the blocks, where tokens halt; such a
            model has `fit_depth(images, share)`.
        compiled: methods that are compiled for inference.
        varying_graph: whether some parameters take no part in some steps (DDP has to look for them).
    """

    num_exits: int = 1
    stage_names: tuple[str, ...] = ("full",)
    recipe: dict[str, object] = {}
    token_labels: bool = False
    cost_varies: bool = False
    knobs: tuple[str, ...] = ()
    depth_shares: tuple[float, ...] = ()
    compiled: tuple[str, ...] = ("stage",)
    varying_graph: bool = False

    def stage(self, k: int, images: Tensor, prev: dict[str, Tensor]) -> StageOutput:
        """Runs stage `k` on full images [B,3,S,S]; `prev` is the info of stage k - 1, {} for the first."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> list[StageOutput]:
        """All stages on all images; one output per exit."""
        outputs: list[StageOutput] = []
        for k in range(self.num_exits):
            outputs.append(self.stage(k, images, outputs[-1].info if outputs else {}))
        return outputs

    def loss(
        self, outputs: list[StageOutput], target: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Named loss terms; the trainer minimises their sum."""
        return {f"exit{k}": criterion(out.logits, target) for k, out in enumerate(outputs)}

    def set_epoch(self, epoch: float) -> None:
        """Moves the model's own schedules to `epoch` (0-based, fractional inside an epoch; infinity is their
        end)."""

    def schedules(self) -> dict[str, float]:
        """Values of these schedules that a log should show."""
        return {}

    def statistics(self, outputs: list[StageOutput]) -> dict[str, Tensor]:
        """Scalars of a batch that a log should show beside the losses."""
        return {}

    def foreign_kwargs(self, source: str, args: dict[str, object]) -> dict[str, object]:
        """Constructor arguments of published weights, from their file's name or its stored command line."""
        return {}

    def kept_patches(self, info: dict[str, Tensor]) -> list[Tensor]:
        """What `info` says about dropped patches, for pictures: after each drop the patches of the full image
        that stay, [B,n], -1 for tokens that are none."""
        return []

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Renames and reshapes the weights of a timm / DeiT model to this model's, as an initialisation."""
        return state


def check_init(init: str) -> str:
    if init not in ("deit", "fan_in"):
        raise ValueError(f"init is {init!r}: take 'deit' or 'fan_in'")
    return init


class AdaptiveViT(Adaptive):
    """Plain ViT with one exit, and the base of the other methods.

    Args:
        img_size: side of the full image in pixels, a multiple of patch_size.
        init: "deit" is truncated normal with std 0.02; "fan_in" scales with the layer's width, halves
            residual outputs and starts position embeddings as 2-D sine-cosine, which trains far faster on
            short schedules.
    """

    num_prefix_tokens = 1  # tokens before the patches

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        residual_scale: float = 1.0,
        init: str = "deit",
    ):
        super().__init__()
        sizes = dict(patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        for name, size in (sizes | dict(num_classes=num_classes, img_size=img_size)).items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is {size!r}: take a whole number from 1 up")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate is {drop_path_rate}: take 0 to below 1")
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        self.img_size, self.patch_size, self.num_classes, self.embed_dim = (
            img_size,
            patch_size,
            num_classes,
            embed_dim,
        )
        self.init = check_init(init)
        self.norm_layer = partial(nn.LayerNorm, eps=norm_eps)
        self.patch_embed = self.make_patch_embed()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.make_pos_embed()
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, rate, self.norm_layer, residual_scale)
            for rate in rates
        )
        self.norm = self.norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)

    def make_patch_embed(self) -> nn.Module:
        return PatchEmbed(self.img_size, self.patch_size, embed_dim=self.embed_dim, strict_img_size=False)

    def make_pos_embed(self) -> None:
        self.pos_embed = nn.Parameter(
            torch.zeros(1, (self.img_size // self.patch_size) ** 2 + self.num_prefix_tokens, self.embed_dim)
        )

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizer factory leaves undecayed, besides biases and norms."""
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if name in ("cls_token", "dist_token") or name.startswith("pos_embed")}

    def check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(
                f"images are {tuple(images.shape)}, expected [B,3,{self.img_size},{self.img_size}]"
            )

    def stage(self, k: int, images: Tensor, prev: dict[str, Tensor]) -> StageOutput:
        self.check_images(images)
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed  # [B,N,C]
        for block in self.blocks:
            x = block(x)
        return StageOutput(self.head(self.norm(x[:, 0])), {})

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Position embeddings are resampled (bicubic) to this model's grids; a distillation token is dropped,
        or starts as the class token where the model has one and the file has not."""
        state = dict(state)
        shared, theirs = state.pop("pos_embed", None), 2 if "dist_token" in state else 1
        ours = self.num_prefix_tokens
        for name, own in self.named_parameters():
            table = state.get(name, shared)
            if name.startswith("pos_embed") and table is not None:
                side = round((own.shape[1] - ours) ** 0.5)
                new = resample_abs_pos_embed(table, [side, side], num_prefix_tokens=theirs, antialias=False)
                prefix = [new[:, min(i, theirs - 1), None] for i in range(ours)]
                state[name] = torch.cat([*prefix, new[:, theirs:]], dim=1)
        if ours > theirs:
            state = {"dist_token": state.get("cls_token"), **state}
        return {name: value for name, value in state.items() if value is not None}


def sincos_table(side: int, frame: int, dim: int) -> Tensor:
    """2-D sine-cosine position table [side*side, dim] in the coordinates of a grid of side `frame`.

    Patch centres are used, so the tables of two grids over one picture agree where the patches do.
    """
    centre = (torch.arange(side) + 0.5) * (frame / side)
    angle = centre[:, None] * 10000 ** -torch.linspace(0, 1, max(dim // 4, 1))  # [side, dim/4]
    wave = torch.cat([angle.sin(), angle.cos()], dim=-1)
    rows = wave[:, None].expand(-1, side, -1)
    table = torch.cat([rows, rows.transpose(0, 1)], dim=-1).flatten(0, 1)
    return F.pad(table, (0, dim - table.shape[-1]))


def init_weights(model: AdaptiveViT) -> AdaptiveViT:
    """Initialises by `model.init`; convolutions keep PyTorch's default, as in DeiT."""
    fan_in = model.init == "fan_in"
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            std = 0.7 * module.in_features**-0.5 if fan_in and not name.startswith("head") else 0.02
            if fan_in and name.endswith(("attn.proj", "mlp.fc2")):
                std *= model.blocks[0].residual_scale / 2  # what reaches the residual stream is halved
            trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    frame, prefix = model.img_size // model.patch_size, model.num_prefix_tokens
    for name, parameter in model.named_parameters():
        if name.endswith("_token"):
            trunc_normal_(parameter, std=0.02)
    for name, parameter in model.named_parameters():
        if name.startswith("pos_embed"):
            trunc_normal_(parameter, std=0.02)
            if fan_in:
                side = round((parameter.shape[1] - prefix) ** 0.5)
                parameter.data[0, prefix:] = 0.5 * sincos_table(side, frame, parameter.shape[-1])
    return model


def build(cls: type[AdaptiveViT], defaults: dict, kwargs: dict) -> AdaptiveViT:
    """What every registered function does: the name's defaults, overridden by the caller's main_deit.

    Raises:
        ValueError: pretrained weights are asked for (none are hosted), or an argument is not the model's.
    """
    kwargs = {
        k: v for k, v in kwargs.items() if k not in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    }
    if kwargs.pop("pretrained", False):
        raise ValueError("no weights are hosted for this model: load a file with --finetune or --resume")
    try:
        return init_weights(cls(**(defaults | kwargs)))
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {str(error).split('__init__() ')[-1]}") from error


# Sizes of the embedded data set: 56x56 pixels, a 14x14 grid, about 0.25 M parameters.
NANO = dict(patch_size=4, num_classes=10, embed_dim=64, depth=4, num_heads=4, init="fan_in")


@register_model
def deit_nano(pretrained: bool = False, **kwargs) -> AdaptiveViT:
    """Plain DeiT at the size of the embedded data set: the baseline of the nano models."""
    return build(AdaptiveViT, NANO | {"img_size": 56}, {"pretrained": pretrained, **kwargs})
