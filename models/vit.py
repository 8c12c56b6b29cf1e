"""The vision transformer that every method here is made of, and the protocol that every method follows.

Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) in DeiT's form (Touvron et al. 2021, arXiv
2012.12877).
Letters: B batch, N tokens (class token first), P = N - 1 patches, C channels, H heads, K classes, L blocks.
"""

import argparse
import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    Mlp,
    PatchEmbed,
    calculate_drop_path_rates,
    resample_abs_pos_embed,
    resample_patch_embed,
    trunc_normal_,
)
from torch import Tensor, nn

from utils import InputError, log


class StageOutput(NamedTuple):
    """What one stage returns.

    Attributes:
        logits: [B,K].
        info: batch-first tensors that the next stage, the loss or the model's own methods read.
    """

    logits: Tensor
    info: dict[str, Tensor]


class Picture(NamedTuple):
    """What a picture may show of a stage; what the stage does not tell is left out.

    Patches are numbered row-major on the grid of the full image.

    Attributes:
        heat: [B,g*g] attention to the cells of a square grid over the image.
        region: [B,4] left, top, right, bottom in pixels of the full image; right and bottom exclusive.
        refined: [B,n] patches that the stage sees at full resolution.
        kept: [B,n] per drop, patches that stay; -1 for a token that is no patch.
        groups: [B,P] number of the token that each patch is part of at the end.
        depth: [B,P] blocks that each patch went through.
        blocks: how many there are, the end of the scale of `depth`.
    """

    heat: Tensor | None = None
    region: Tensor | None = None
    refined: Tensor | None = None
    kept: tuple[Tensor, ...] = ()
    groups: Tensor | None = None
    depth: Tensor | None = None
    blocks: int = 0


class Knob(NamedTuple):
    """An attribute of a trained model that trades accuracy for cost.

    Attributes:
        type: of its values, float or int.
        low, high: the least and the greatest value that make sense.
    """

    type: Callable[[str], Any]
    low: float
    high: float


class Flag(NamedTuple):
    """A command-line flag of a constructor argument, which a method declares on its class.

    Attributes:
        names: as they are typed, separated by spaces; - and _ mean the same in them.
        help: one line.
        type: from text to value; bool makes a --flag with its --no-flag.
        argument: of the constructor; default: the first name.
        epochs: the value is a share of the run's epochs and the argument a number of epochs.
        training: for the training command alone.
    """

    names: str
    help: str
    type: Callable[[str], Any] = float
    argument: str = ""
    epochs: bool = False
    training: bool = False

    @property
    def words(self) -> list[str]:
        """The names as identifiers; the parsed value has the first."""
        return [name.lstrip("-").replace("-", "_") for name in self.names.split()]

    @property
    def target(self) -> str:
        """The constructor's argument."""
        return self.argument or self.words[0]

    @property
    def spellings(self) -> list[str]:
        """What may be typed."""
        return list(dict.fromkeys(f"--{word.replace('_', by)}" for word in self.words for by in "_-"))

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        """Add the flag to a parser or a group of one."""
        form = {"action": argparse.BooleanOptionalAction} if self.type is bool else {"type": self.type}
        parser.add_argument(*self.spellings, dest=self.words[0], help=self.help, **form)


class Attention(nn.Module):
    """Multi-head self-attention on the fused kernel; on request also what a selection of tokens reads.

    The class token's row of the map costs one query, O(N), so the [B,H,N,N] map never exists.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        if dim % num_heads:
            raise InputError(f"embed_dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, need: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            x: [B,N,C].
            bias: added to the scaled logits before the softmax, broadcastable to [B,H,N,N].
            need: "cls" for the class token's attention to the patches, "keys" for the keys.

        Returns:
            [B,N,C], and what was needed: for "cls" [B,P] softmax weights, float32, for "keys" [B,N,C/H]; both
            are means over the heads.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B,H,N,d]
        extra = None
        if need is not None:
            extra = k.mean(dim=1) if need == "keys" else self.class_row(q, k, bias)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).flatten(2)), extra

    def class_row(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        """Return the attention of the class token to the patches, [B,P], from q and k [B,H,N,d]."""
        logits = (self.scale * q[:, :, :1]) @ k.transpose(-2, -1)  # [B,H,1,N]; scaled first for fp16
        logits = logits.float()
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
        recipe: training options of the published recipe, by the names of main_deit.py.
        flags: command-line flags of the constructor's arguments.
        knobs: attributes that may be set after training to trade accuracy for cost; a log shows their values.
        token_labels: whether `loss` takes targets [B,K,1+P], one per patch of the full image.
        compiled: methods that are compiled for inference, with further arguments of torch.compile.
        varying_graph: whether some parameters take no part in some steps (DDP has to look for them).
    """

    num_exits: int = 1
    stage_names: tuple[str, ...] = ("full",)
    recipe: dict[str, Any] = {}
    flags: tuple[Flag, ...] = ()
    knobs: dict[str, Knob] = {}
    token_labels: bool = False
    compiled: dict[str, dict[str, Any]] = {"stage": {}}
    varying_graph: bool = False

    def stage(self, k: int, images: Tensor, prev: dict[str, Tensor]) -> StageOutput:
        """Run stage `k` on full images [B,3,S,S]; `prev` is the info of stage k - 1, {} for the first."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> list[StageOutput]:
        """Run all stages on all images; return one output per exit."""
        outputs: list[StageOutput] = []
        for k in range(self.num_exits):
            outputs.append(self.stage(k, images, outputs[-1].info if outputs else {}))
        return outputs

    def loss(
        self, outputs: list[StageOutput], target: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Return named loss terms; the trainer minimises their sum."""
        return {f"exit{k}": criterion(out.logits, target) for k, out in enumerate(outputs)}

    def set_epoch(self, epoch: float) -> None:
        """Move the schedules to an epoch, 0-based and fractional inside one; infinity is their end."""

    def image_gflops(self, k: int, info: dict[str, Tensor]) -> Tensor | None:
        """Return what stage `k` cost each image, [B] GFLOPs, where that depends on the image; else None."""
        return None

    def picture(self, info: dict[str, Tensor]) -> Picture:
        """Return what a picture may show of a stage, from its info."""
        return Picture()

    def statistics(self, outputs: list[StageOutput]) -> dict[str, Tensor]:
        """Return scalars of a batch that a log should show beside the losses."""
        return {}

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename and reshape the weights of a timm or DeiT model to this model's, as an initialisation.

        What has no place in the model keeps its name and shape, so that it can be reported.
        """
        return state


def check_init(init: str) -> str:
    if init not in ("deit", "fan_in"):
        raise InputError(f"init is {init!r}: take 'deit' or 'fan_in'")
    return init


class AdaptiveViT(Adaptive):
    """Plain ViT with one exit, and the base of the other methods.

    `stage` is `embed`, then `run`, then `read_out`: a method overrides the one that it changes.

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
                raise InputError(f"{name} is {size!r}: take a whole number from 1 up")
        if not 0 <= drop_path_rate < 1:
            raise InputError(f"drop_path_rate is {drop_path_rate}: take 0 to below 1")
        if img_size % patch_size:
            raise InputError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
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
        rates = calculate_drop_path_rates(drop_path_rate, depth)
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
        """Return the parameters that timm's optimizer factory leaves undecayed, besides biases and norms."""
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if name in ("cls_token", "dist_token") or name.startswith("pos_embed")}

    def check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(
                f"images are {tuple(images.shape)}, expected [B,3,{self.img_size},{self.img_size}]"
            )

    def stage(self, k: int, images: Tensor, prev: dict[str, Tensor]) -> StageOutput:
        self.check_images(images)
        return self.read_out(*self.run(self.embed(images)))

    def embed(self, images: Tensor) -> Tensor:
        """Return all tokens of images [B,3,S,S] with their positions, [B,N,C]."""
        patches = self.patch_embed(images)
        prefix = [token.expand(patches.shape[0], -1, -1) for token in self.prefix_tokens()]
        return torch.cat([*prefix, patches], dim=1) + self.positions(patches.shape[1])

    def prefix_tokens(self) -> list[Tensor]:
        """Return the learned tokens before the patches, [1,1,C] each."""
        return [self.cls_token]

    def positions(self, patches: int) -> Tensor:
        """Return the positions of all tokens, [1,N,C], for an image of so many patches."""
        return self.pos_embed

    def run(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the blocks on tokens [B,N,C]; return what is left of them, and the stage's info."""
        info: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            x = self.reduce(x, block, i, info)
        return x, info

    def reduce(self, x: Tensor, block: Block, i: int, info: dict[str, Tensor]) -> Tensor:
        """Run block number `i` on tokens [B,N,C]; a method that drops or merges tokens lets fewer leave.

        What later blocks, a picture or the loss must know of it goes into `info`. Where `places` [B,N] is in
        it, a reducer keeps it: the place that each token had at first, -1 for one that had none.
        """
        return block(x)

    def key_bias(self, info: dict[str, Tensor]) -> Tensor | None:
        """Return what `reduce` adds to the logits of the keys of its next block, [B,1,1,N], if anything."""
        return None

    def read_out(self, x: Tensor, info: dict[str, Tensor]) -> StageOutput:
        """Return the logits [B,K] of tokens [B,N,C] that have passed all blocks, with the stage's info."""
        return StageOutput(self.head(self.norm(x[:, 0])), info)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resample position embeddings (bicubic) and kernels of another patch size; fold layer scale.

        A distillation token starts as the class token where only the model has one. The class token's
        position is zero where the table is of patches alone, as in DeiT III.
        """
        own = dict(self.named_parameters())
        state = fold_layer_scale(state, own)
        shared = state.get("pos_embed")
        for name in [name for name in own if name.startswith("pos_embed")]:
            table = state.get(name, shared)
            before = None if table is None else count_prefix(table, state)
            if before is not None:
                names, prefix = 1 + ("dist_token" in state), self.num_prefix_tokens
                state[name] = fit_positions(table, (before, names), (own[name].shape[1], prefix))
                if table is shared and "pos_embed" not in own:
                    state.pop("pos_embed", None)
        if self.num_prefix_tokens > 1 and "cls_token" in state:
            state.setdefault("dist_token", state["cls_token"])
        name = "patch_embed.proj.weight"
        kernel, ours = state.get(name), own.get(name)
        if (
            ours is not None
            and kernel is not None
            and kernel.ndim == 4
            and kernel.shape[:2] == ours.shape[:2]
        ):
            state[name] = resample_patch_embed(kernel, list(ours.shape[2:]))
        return state


# Learned scales of a branch (DeiT III, CaiT), and the layer before each.
LAYER_SCALES = {
    "ls1.gamma": "attn.proj",
    "ls2.gamma": "mlp.fc2",
    "gamma_1": "attn.proj",
    "gamma_2": "mlp.fc2",
}


def fold_layer_scale(state: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Return a state dict whose layer scales, where the model has none, are part of the layer before them."""
    state, folded = dict(state), 0
    for name in [name for name in state if name not in own]:
        end = next((end for end in LAYER_SCALES if name.endswith(f".{end}")), None)
        layer = end and name.removesuffix(end) + LAYER_SCALES[end]
        scale, weight = state[name], state.get(f"{layer}.weight")
        if end and weight is not None and weight.ndim == 2 and scale.shape == weight.shape[:1]:
            state[f"{layer}.weight"] = weight * state.pop(name)[:, None]
            if f"{layer}.bias" in state:
                state[f"{layer}.bias"] = state[f"{layer}.bias"] * scale
            folded += 1
    if folded:
        log.info("%d layer scales are multiplied into the layers before them", folded)
    return state


def count_prefix(table: Tensor, state: dict[str, Tensor]) -> int | None:
    """Return how many entries of a position table [1,n,C] come before those of a square grid of patches.

    No more than there are tokens before the patches; None where no square grid is left.
    """
    if table.ndim != 3:
        return None
    tokens = [state[name] for name in ("dist_token", "reg_token", "register_tokens") if name in state]
    most, n = 1 + sum(token.shape[1] for token in tokens if token.ndim == 3), table.shape[1]
    return next((p for p in range(min(most + 1, n)) if math.isqrt(n - p) ** 2 == n - p), None)


def fit_positions(table: Tensor, theirs: tuple[int, int], ours: tuple[int, int]) -> Tensor:
    """Return a position table [1,n,C] for another square grid and other tokens before the patches.

    Args:
        table: of the file.
        theirs: its entries before the patches, and how many of them are of class and distillation token.
        ours: entries of the model, and those before the patches.
    """
    before, known = theirs
    count, prefix = ours
    side = math.isqrt(count - prefix)
    new = resample_abs_pos_embed(table, [side, side], num_prefix_tokens=before, antialias=False)
    first = new[:, : min(before, known)]
    if not before:
        first = torch.zeros_like(new[:, :1])
        log.info("the position table has no entry for the class token, which starts with none")
    last = first.shape[1] - 1
    return torch.cat([*(first[:, min(i, last), None] for i in range(prefix)), new[:, before:]], dim=1)


def sincos_table(side: int, frame: int, dim: int) -> Tensor:
    """Return a 2-D sine-cosine position table [side*side, dim] in the coordinates of a grid of side `frame`.

    Patch centres are used, so the tables of two grids over one picture agree where the patches do.
    """
    centre = (torch.arange(side) + 0.5) * (frame / side)
    angle = centre[:, None] * 10000 ** -torch.linspace(0, 1, max(dim // 4, 1))  # [side, dim/4]
    wave = torch.cat([angle.sin(), angle.cos()], dim=-1)
    rows = wave[:, None].expand(-1, side, -1)
    table = torch.cat([rows, rows.transpose(0, 1)], dim=-1).flatten(0, 1)
    return F.pad(table, (0, dim - table.shape[-1]))


def init_weights(model: AdaptiveViT) -> AdaptiveViT:
    """Initialise by `model.init`; convolutions keep PyTorch's default, as in DeiT, and fixed tables stay."""
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
        if name.startswith("pos_embed") and parameter.requires_grad:
            trunc_normal_(parameter, std=0.02)
            if fan_in:
                side = round((parameter.shape[1] - prefix) ** 0.5)
                parameter.data[0, prefix:] = 0.5 * sincos_table(side, frame, parameter.shape[-1])
    return model


# Sizes of the embedded data set: 56x56 pixels, a 14x14 grid, about 0.25 M parameters.
NANO = dict(patch_size=4, num_classes=10, embed_dim=64, depth=4, num_heads=4, init="fan_in")
