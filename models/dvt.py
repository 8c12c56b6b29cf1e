"""DVT: three whole transformers, each with more tokens than the last, run until one is sure of its answer.

Wang et al., "Not All Images are Worth 16x16 Words: Dynamic Transformers for Efficient Image Recognition",
NeurIPS 2021, arXiv 2105.15075. Each reuses the last features and all attention logits of the one before it.
Grid side s, P = s*s patches, N = P + 1 tokens, and s', P', N' in the transformer before.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.registry import arguments, build, reducers, register
from models.t2t import RECIPE, RECIPE_12, T2T_12, T2T_14, T2TViT, grid_sides
from models.vit import NANO, Adaptive, AdaptiveViT, Block, Picture, StageOutput
from utils import InputError

REUSED = 48  # channels of the reused features
ROWS = 4096  # of all maps that are mixed at once on a CPU
PREFIXES = ("less_less_token", "less_token", "normal_token")  # of the published weights, one per exit


def recompute(function: Callable, *inputs):
    """Calls a function; for a backward pass its inputs alone are kept, and it is called again."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Enlarge(nn.Module):
    """From the grid before to the own: nearest neighbour to twice the side, then adaptive average pooling.

    Both are linear and act on rows and columns alike: X becomes M X M^T with a fixed M [s,s'].
    """

    def __init__(self, source: int, side: int):
        super().__init__()
        doubled = np.eye(source).repeat(2, axis=0)  # [2s',s']
        windows = [doubled[2 * source * i // side : -(-2 * source * (i + 1) // side)] for i in range(side)]
        matrix = torch.tensor(np.stack([window.mean(axis=0) for window in windows]), dtype=torch.float32)
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Patches [...,P',n] to [...,P,n]."""
        source, n = self.matrix.shape[1], x.shape[-1]
        x = self.matrix @ x.unflatten(-2, (source, source)).flatten(-2)  # [...,s,s'*n]
        return (self.matrix @ x.unflatten(-1, (source, n))).flatten(-3, -2)

    def queries(self, x: Tensor) -> Tensor:
        """Rows of tokens [...,N',n] to [...,N,n]; the class token's stays as it is."""
        return torch.cat([x[..., :1, :], self(x[..., 1:, :])], dim=-2)

    def keys(self, x: Tensor) -> Tensor:
        """Columns of tokens [...,n,N'] to [...,n,N]."""
        return self.queries(x.transpose(-2, -1)).transpose(-2, -1)


class ReuseBlock(Block):
    """Plain block, except:

    - logits from the exit before are added to its own before the softmax (section 3.3, relationship reuse);
    - the MLP of a patch also sees features of the exit before, through a small network (feature reuse).

    Args:
        plain: block to take attention and sizes from.
        feature_reuse: whether the MLP is widened.
        enlarge: from the grid before, if there is one.
    """

    def __init__(self, plain: Block, norm_layer: Callable, feature_reuse: bool, enlarge: Enlarge | None):
        dim = plain.attn.proj.in_features
        super().__init__(
            dim, plain.attn.num_heads, norm_layer=norm_layer, residual_scale=plain.residual_scale
        )
        self.attn, self.mlp, self.drop_path = plain.attn, plain.mlp, plain.drop_path
        self.feature_reuse, self.enlarge = feature_reuse, enlarge
        if feature_reuse:
            self.norm2 = norm_layer(dim + REUSED)
            self.mlp = Mlp(dim + REUSED, plain.mlp.fc1.out_features, dim)
            self.feature_resuse_mlp = nn.Sequential(norm_layer(dim), Mlp(dim, 128, REUSED))  # as published

    def attend(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        need: str | None = None,
        alone: bool = False,
        places: Tensor | None = None,
        own_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """From [B,N,C] to [B,N,C], or to [B,1,C] where only the class token, `alone`, is wanted.

        `bias` [B,H,N',N'] are logits to add, still on the grid before; `places` [B,N] says where on the own
        grid the tokens of x stand, by default all in order. `own_bias` is added as it is. `need` "relation"
        returns the scaled logits [B,H,N,N] with what was added; others see models.vit.Attention.
        """
        attn, wanted = self.attn, slice(1 if alone else None)

        def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            if bias is not None:
                bias = self.enlarge.keys(bias[:, :, wanted])
                bias = bias if alone else self.enlarge.queries(bias)  # [B,H,N,N] or [B,H,1,N]
                if places is not None:
                    bias = at_places(bias, places, dim=-1)
                    bias = bias if alone else at_places(bias, places, dim=-2)
            if own_bias is not None:
                bias = own_bias if bias is None else bias + own_bias
            if need != "relation":
                extra = None
                if need is not None:
                    extra = k.mean(dim=1) if need == "keys" else attn.class_row(q, k, bias)
                return F.scaled_dot_product_attention(q[:, :, wanted], k, v, attn_mask=bias), extra
            logits = (attn.scale * q) @ k.transpose(-2, -1)  # scaled first for fp16
            logits = logits if bias is None else logits + bias
            return logits.softmax(dim=-1) @ v, logits

        q, k, v = attn.qkv(self.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        plain = bias is None and need is None
        out, logits = attention(q, k, v, bias) if plain else recompute(attention, q, k, v, bias)
        return self.residual(x[:, wanted], attn.proj(out.transpose(1, 2).flatten(2))), logits

    def feed(self, x: Tensor, features: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """The MLP on [B,N,C] and features [B,P',C] of the exit before, None for the class token alone."""
        if not self.feature_reuse:
            return super().feed(x)
        if features is None:
            reused = x.new_zeros(*x.shape[:2], REUSED)
        else:  # the class token reuses nothing
            reused = F.pad(self.enlarge(self.feature_resuse_mlp(features)), (0, 0, 1, 0))
            reused = reused if places is None else at_places(reused, places, dim=-2)
        return self.residual(x, self.mlp(self.norm2(torch.cat([x, reused], dim=-1))))


def at_places(x: Tensor, places: Tensor, dim: int) -> Tensor:
    """Take from dimension `dim` of x [B,...] what is at `places` [B,n]; zeros where a place is -1."""
    shape, index = [places.shape[0]] + [1] * (x.ndim - 1), list(x.shape)
    shape[dim] = index[dim] = places.shape[1]
    places = places.view(shape)
    return x.gather(dim, places.clamp(min=0).expand(index)).where(places >= 0, 0.0)


class Reused(NamedTuple):
    """A block of an exit with what it reuses, which a reducer runs as any other block."""

    block: ReuseBlock
    bias: Tensor | None
    features: Tensor | None
    info: dict[str, Tensor]

    def attend(
        self, x: Tensor, bias: Tensor | None = None, need: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return self.block.attend(x, self.bias, need, places=self.info["places"], own_bias=bias)

    def feed(self, x: Tensor) -> Tensor:
        return self.block.feed(x, self.features, self.info["places"])

    def __call__(self, x: Tensor) -> Tensor:
        return self.feed(self.attend(x)[0])


class Exit(AdaptiveViT):
    """Plain ViT, except:

    - `relation_reuse_conv` mixes the logits of all blocks of the exit before, still on its grid; every block
      enlarges its part itself, so that the large maps of two blocks never exist at once;
    - its info is what the next exit reuses: `features` [B,N,C] of the last block, `relation` [B,L*H,N,N];
    - in evaluation the last block of the last exit makes the class token alone;
    - a reducer, if there is one, works in the last exit, which hands nothing on.

    Args:
        exit: its number, 0 to 2; the first reuses nothing, the last hands nothing on.
        sides: of the grids of all exits.
        feature_reuse, relation_reuse: the switches of section 3.3.
    """

    padding = 0  # of the images

    def __init__(
        self, exit: int, sides: Sequence[int], feature_reuse: bool = True, relation_reuse: bool = True, **vit
    ):
        super().__init__(**vit)
        self.side, first, self.last = sides[exit], exit == 0, exit == len(sides) - 1
        self.reads_features, self.reads_relation = feature_reuse and not first, relation_reuse and not first
        self.hands_features = feature_reuse and not self.last
        self.hands_relation = relation_reuse and not self.last
        reuse = self.norm_layer, self.reads_features, None if first else Enlarge(sides[exit - 1], self.side)
        self.blocks = nn.ModuleList(ReuseBlock(block, *reuse) for block in self.blocks)
        if self.reads_relation:
            maps = len(self.blocks) * self.blocks[0].attn.num_heads
            layers = nn.Conv2d(maps, 3 * maps, 1), nn.GELU(), nn.Conv2d(3 * maps, maps, 1)
            self.relation_reuse_conv = nn.Sequential(*layers)

    def embed(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return super().embed(F.pad(images, [self.padding] * 4))

    def mix(self, relation: Tensor) -> Tensor:
        """`relation_reuse_conv` on logits [B,L*H,N',N'], the shape of the result."""
        if relation.device.type != "cpu" or torch.compiler.is_compiling():
            return self.relation_reuse_conv(relation)
        # A 1x1 convolution is a matrix product. In parts the widened maps stay in the cache: 4 times as fast.
        (w0, b0), (w1, b1) = ((conv.weight.flatten(1), conv.bias) for conv in self.relation_reuse_conv[::2])
        rows = relation.flatten(2).transpose(1, 2).flatten(0, 1)  # [B*N'*N',L*H]
        mixed = [F.linear(F.gelu(F.linear(part, w0, b0)), w1, b1) for part in rows.split(ROWS)]
        parts = relation.shape[0], relation.shape[2:].numel()
        return torch.cat(mixed).unflatten(0, parts).transpose(1, 2).view(relation.shape)

    def stage(self, k: int, images: Tensor, prev: dict[str, Tensor]) -> StageOutput:
        x, biases, relation, info = self.embed(images), [None] * len(self.blocks), [], {}
        features = prev["features"][:, 1:] if self.reads_features else None
        if self.reads_relation:
            mixed = recompute(self.mix, prev["relation"])
            biases = mixed.chunk(len(self.blocks), dim=1)  # each [B,H,N',N']
        need = "relation" if self.hands_relation else None
        reduces = type(self).reduce is not AdaptiveViT.reduce
        if reduces:
            info["places"] = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        for i, (block, bias) in enumerate(zip(self.blocks, biases, strict=True)):
            # Training computes all, so that the last block's small network has its gradient, of zero.
            alone = self.last and block is self.blocks[-1] and not self.training
            if reduces and not alone:
                x = self.reduce(x, Reused(block, bias, features, info), i, info)
                continue
            x, logits = block.attend(x, bias, need, alone, info.get("places"), self.key_bias(info))
            x = block.feed(x, None if alone else features)
            relation.append(logits)
        if self.hands_features:
            info["features"] = x
        if self.hands_relation:
            info["relation"] = torch.cat(relation, dim=1)
        return StageOutput(self.head(self.norm(x[:, 0])), info)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From a plain ViT; what also sees reused features keeps its own weights for those."""
        state = super().adapt_state_dict(state)
        for name, own in self.state_dict().items():
            value = state.get(name)
            if "blocks" in name and value is not None and value.shape == own[..., :-REUSED].shape:
                state[name] = torch.cat([value, own[..., -REUSED:]], dim=-1)
        return state


class DeiTExit(Exit):
    """Exit on DeiT: 7x7, 10x10 or 14x14 patches, cut from the image padded to a multiple of that.

    Args:
        patch_size: of the last exit.
        img_size: 14 * patch_size; either of the two is enough.
    """

    def __init__(self, exit: int, patch_size: int | None = None, img_size: int | None = None, **vit):
        img_size, sides = img_size or 14 * (patch_size or 16), (7, 10, 14)
        if img_size % 14 or patch_size not in (None, img_size // 14):
            raise InputError(f"img_size {img_size}, patch_size {patch_size}: the last exit has 14x14 patches")
        patch = -(-img_size // sides[exit])
        super().__init__(exit, sides, img_size=sides[exit] * patch, patch_size=patch, **vit)
        self.padding, self.img_size = (self.img_size - img_size) // 2, img_size


class T2TExit(Exit, T2TViT):
    """Exit on T2T-ViT: 7x7, 10x10 or 14x14 tokens at 224 pixels, by the first unfold."""

    def __init__(self, exit: int, img_size: int = 224, **vit):
        windows = (14, 8, 3), (11, 6, 5), (7, 4, 2)
        sides = [grid_sides(img_size, window)[-1] for window in windows]
        super().__init__(exit, sides, img_size=img_size, window=windows[exit], **vit)


class DVT(Adaptive):
    """The cascade; its loss is the sum of the exits' (section 3.1), and nothing handed on is detached."""

    num_exits = 3

    def __init__(self, exits: list[Exit]):
        super().__init__()
        for prefix, part in zip(PREFIXES, exits, strict=True):
            self.add_module(prefix, part)
        self.img_size, self.patch_size, self.num_classes = part.img_size, part.patch_size, part.num_classes
        self.stage_names = tuple(f"{part.side}x{part.side}" for part in exits)

    def stage(self, k: int, images: Tensor, prev: dict[str, Tensor]) -> StageOutput:
        return self.get_submodule(PREFIXES[k]).stage(0, images, prev)

    def set_epoch(self, epoch: float) -> None:
        for part in self.children():
            part.set_epoch(epoch)

    def picture(self, info: dict[str, Tensor]) -> Picture:
        return self.get_submodule(PREFIXES[-1]).picture(info)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(("cls_token", "pos_embed"))}

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A plain ViT starts all three exits; a cascade is taken as it is."""
        if any(name.startswith(PREFIXES) for name in state):
            return state
        parts = {prefix: part.adapt_state_dict(state) for prefix, part in self.named_children()}
        return {f"{prefix}.{name}": value for prefix, part in parts.items() for name, value in part.items()}


def register_cascade(names: str, cls: type[Exit], text: str, recipe: dict[str, Any], **defaults: Any) -> None:
    """Register a cascade of exits of one class."""

    def make(defaults: dict[str, Any], kwargs: dict[str, Any]) -> DVT:
        reducer = reducers.get(kwargs.get("reducer"), AdaptiveViT)
        own = {"reducer", *arguments(reducer)} - set(arguments(AdaptiveViT))
        early = {name: value for name, value in kwargs.items() if name not in own}
        exits = [build(cls, defaults, early, exit=k) for k in range(DVT.num_exits - 1)]
        return DVT([*exits, build(cls, defaults, kwargs, exit=len(exits))])

    register(names, DVT, text, make, recipe, **defaults)


register_cascade("dvt_t2t_vit_12 DVT_T2t_vit_12", T2TExit, "DVT on T2T-ViT-12.", RECIPE_12, **T2T_12)
register_cascade("dvt_t2t_vit_14 DVT_T2t_vit_14", T2TExit, "DVT on T2T-ViT-14.", RECIPE, **T2T_14)
# No recipe was published for DVT on DeiT: ours is DeiT's, the defaults of main_deit.py.
register_cascade("dvt_deit_small DVT_Deit_small", DeiTExit, "DVT on DeiT-S.", {})
register_cascade("dvt_deit_nano", DeiTExit, "DVT at the size of the embedded data set.", {}, **NANO)
