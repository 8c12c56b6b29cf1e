"""Tokens-to-token ViT: two rounds of overlapping windows and attention make the tokens of a plain ViT.

Yuan et al., "Tokens-to-Token ViT", ICCV 2021, arXiv 2101.11986; with the attention of Choromanski et al.,
"Rethinking Attention with Performers", ICLR 2021, arXiv 2009.14794.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from models.registry import register
from models.vit import AdaptiveViT
from utils import InputError

Window = tuple[int, int, int]  # kernel, stride and padding of an unfold
LATER: Window = (3, 2, 1)  # the second and the third unfold
ROWS = 4096  # windows of the first unfold that are attended to at once on a CPU


def grid_sides(side: int, window: Window) -> list[int]:
    """Sides of the grids after the first unfold of an image, `window`, and after the two later ones."""
    return [side := (side + 2 * p - k) // s + 1 for k, s, p in (window, LATER, LATER)]


def windows(x: Tensor, window: Window) -> Tensor:
    """Return the overlapping windows of a grid [B,h,w,C], zeros around it, as [B,N,k*k*C].

    nn.Unfold has the k*k numbers of a channel side by side; here the C of a pixel are, as in memory, so that
    whole rows of a window are copied. `by_pixel` puts weights into this order.
    """
    k, stride, p = window
    x = F.pad(x, (0, 0, p, p, p, p)).unfold(1, k, stride).unfold(2, k, stride)  # [B,h',w',C,k,k]
    return x.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)


def by_pixel(weight: Tensor, channels: int) -> Tensor:
    """Reorder the inputs of weights [...,C*k*k] of windows from that of nn.Unfold to that of `windows`."""
    return weight.unflatten(-1, (channels, -1)).transpose(-2, -1).flatten(-2)


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear, channels: int) -> Tensor:
    """Return `linear(norm(x))` of windows [B,N,k*k*C]."""
    scale, shift = by_pixel(norm.weight, channels), by_pixel(norm.bias, channels)
    x = F.layer_norm(x, scale.shape, scale, shift, norm.eps)
    return F.linear(x, by_pixel(linear.weight, channels), linear.bias)


def sinusoid(count: int, dim: int) -> Tensor:
    """Position table [1,count,dim] of Vaswani et al. 2017 (arXiv 1706.03762, section 3.5)."""
    angle = np.arange(count)[:, None] / 10000 ** (2 * (np.arange(dim) // 2) / dim)
    angle[:, 0::2], angle[:, 1::2] = np.sin(angle[:, 0::2]), np.cos(angle[:, 1::2])
    return torch.tensor(angle, dtype=torch.float32)[None]


class TokenPerformer(nn.Module):
    """Linear attention by random features, with the skip connection from the values, then an MLP.

    Without autocast: the exponentials have a wide range. Both dropouts are the method's own, at a fixed rate.
    """

    float32_only = True  # see models.weights.cast_weights

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(width)
        self.kqv, self.proj = nn.Linear(dim, 3 * width), nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.Dropout(0.1))
        self.w = nn.Parameter(torch.empty(width // 2, width), requires_grad=False)
        nn.init.orthogonal_(self.w, gain=(width // 2) ** 0.5)

    def features(self, x: Tensor) -> Tensor:
        """Positive random features [B,N,m] of queries or keys [B,N,c] (Performers, lemma 1)."""
        w = self.w.float()
        return (F.linear(x, w) - x.pow(2).sum(dim=-1, keepdim=True) / 2).exp() / len(w) ** 0.5

    def forward(self, x: Tensor, channels: int = 1) -> Tensor:
        """`windows` [B,N,dim] of so many channels to [B,N,width]."""
        with torch.autocast(x.device.type, enabled=False):
            kqv = norm_linear(x.to(self.kqv.weight.dtype), self.norm1, self.kqv, channels)
            k, q, v = kqv.chunk(3, dim=-1)
            k, q = self.features(k.float()), self.features(q.float())  # [B,N,m]
            out = q @ (k.transpose(1, 2) @ v.float()) / (q @ k.sum(dim=1)[..., None] + 1e-8)  # [B,N,c]
            x = v + self.drop(self.proj(out.to(v.dtype)))
            return x + self.mlp(self.norm2(x))


class TokenTransformer(nn.Module):
    """What the performer stands in for: softmax attention, one head, scaled by the width of the input."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(width)
        layers = {"qkv": nn.Linear(dim, 3 * width, bias=False), "proj": nn.Linear(width, width)}
        self.attn, self.mlp = nn.ModuleDict(layers), Mlp(width, width)

    def forward(self, x: Tensor, channels: int = 1) -> Tensor:
        """`windows` [B,N,dim] of so many channels to [B,N,width]."""
        qkv = norm_linear(x, self.norm1, self.attn["qkv"], channels)
        q, k, v = qkv[:, None].chunk(3, dim=-1)  # each [B,1,N,c]
        out = F.scaled_dot_product_attention(q, k, v, scale=x.shape[-1] ** -0.5)
        x = (v + self.attn["proj"](out))[:, 0]
        return x + self.mlp(self.norm2(x))


TOKENISERS = {"performer": TokenPerformer, "transformer": TokenTransformer}


class TokensToToken(nn.Module):
    """Unfold, attention, unfold, attention, unfold, projection (T2T-ViT, section 3.1)."""

    def __init__(self, embed_dim: int, sides: list[int], window: Window, tokens_type: str, token_dim: int):
        super().__init__()
        if tokens_type not in TOKENISERS:
            raise InputError(f"tokens_type is {tokens_type!r}: take one of {', '.join(TOKENISERS)}")
        if not isinstance(token_dim, int) or token_dim < 2:
            raise InputError(f"token_dim is {token_dim!r}: take a whole number from 2 up")
        self.sides, self.window, self.token_dim = sides, window, token_dim
        self.attention1 = TOKENISERS[tokens_type](3 * window[0] ** 2, token_dim)
        self.attention2 = TOKENISERS[tokens_type](token_dim * LATER[0] ** 2, token_dim)
        self.project = nn.Linear(token_dim * LATER[0] ** 2, embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """[B,3,S,S] to [B,P,C]."""
        if images.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return self.tokens(images)
        # In parts that stay in the cache; large batches take memory from the system at every operation.
        return torch.cat([self.tokens(part) for part in images.split(ROWS // self.sides[0] ** 2 or 1)])

    def tokens(self, images: Tensor) -> Tensor:
        """What `forward` returns, all at once."""
        x = self.attention1(windows(images.permute(0, 2, 3, 1), self.window), images.shape[1])
        x = self.attention2(windows(x.unflatten(1, (self.sides[0], -1)), LATER), self.token_dim)
        x = windows(x.unflatten(1, (self.sides[1], -1)), LATER)
        return F.linear(x, by_pixel(self.project.weight, self.token_dim), self.project.bias)


# The training of DVT's larger model, on T2T-ViT's code; batches of 512.
RECIPE = dict(lr=5e-4, unscale_lr=True, weight_decay=0.05, seed=42, repeated_aug=False, eval_ema=True)
RECIPE |= dict(warmup_epochs=20, cooldown_epochs=10, sched_on_updates=False, train_interpolation="random")
RECIPE_12 = RECIPE | dict(lr=2e-3, weight_decay=0.03)  # of the smaller one; batches of 1024


class T2TViT(AdaptiveViT):
    """Plain ViT, except: tokens from `TokensToToken`, and a position table that is stored but not trained.

    Args:
        img_size: side of the image in pixels.
        window: kernel, stride and padding of the first unfold.
        tokens_type: attention of the tokeniser, "performer" or "transformer".
        token_dim: its width.
    """

    def __init__(
        self,
        img_size: int = 224,
        window: Window = (7, 4, 2),
        tokens_type: str = "performer",
        token_dim: int = 64,
        **vit,
    ):
        sides, patch = grid_sides(img_size, window), 4 * window[1]
        self.tokeniser = sides, window, tokens_type, token_dim  # read by make_patch_embed
        super().__init__(img_size=sides[-1] * patch, patch_size=patch, **vit)  # the image with its padding
        self.img_size = img_size

    def make_patch_embed(self) -> Callable[[Tensor], Tensor]:
        self.tokens_to_token = TokensToToken(self.embed_dim, *self.tokeniser)
        return self.tokens_to_token.forward  # no module: the weights have their published names only

    def make_pos_embed(self) -> None:
        count = (self.img_size // self.patch_size) ** 2 + 1
        self.pos_embed = nn.Parameter(sinusoid(count, self.embed_dim), requires_grad=False)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The position table is fixed."""
        return {name: value for name, value in state.items() if name != "pos_embed"}


T2T_12 = dict(embed_dim=256, depth=12, num_heads=4, mlp_ratio=2.0, qkv_bias=False, norm_eps=1e-5)
T2T_14 = dict(embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0, qkv_bias=False, norm_eps=1e-5)


register("t2t_vit_12", T2TViT, "Plain T2T-ViT-12, trained as DVT of that size.", recipe=RECIPE_12, **T2T_12)
register("t2t_vit_14", T2TViT, "Plain T2T-ViT-14, trained as DVT of that size.", recipe=RECIPE, **T2T_14)
