"""ToMe: in every block the most similar tokens merge into one, which needs no training.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.registry import register, register_reducer
from models.vit import NANO, AdaptiveViT, Block, Flag, Knob, Picture
from utils import InputError


@torch.no_grad()
def match(keys: Tensor, r: int, prefix: int = 1) -> Tensor:
    """Decide where every token goes when `r` of them merge (section 3, bipartite soft matching).

    Each token at an even place proposes the odd one that is most similar to it by cosine; the `r` most
    similar pairs merge. The other even tokens come first, in their order, then all odd ones.

    Args:
        keys: [B,N,d].
        r: 0 to (N - prefix) // 2.
        prefix: tokens at the start that never merge, 1 or 2.

    Returns:
        [B,N] int64, the new place of each token, 0 to N - r - 1.
    """
    keys = F.normalize(keys.float(), dim=-1)
    even, odd = keys[:, ::2], keys[:, 1::2]
    scores = F.pad((even @ odd.transpose(1, 2))[:, 1:, prefix - 1 :], (prefix - 1, 0, 1, 0), value=-2.0)
    best, partner = scores.max(dim=-1)  # [B,E], E = even tokens
    merged, rest = best.argsort(dim=-1, descending=True, stable=True).tensor_split([r], dim=1)
    left = even.shape[1] - r
    place = torch.arange(left, device=keys.device).expand_as(rest)
    places = torch.zeros_like(partner).scatter(1, rest.sort(dim=1).values, place)
    places = places.scatter(1, merged, left + partner.gather(1, merged))
    token = torch.arange(keys.shape[1], device=keys.device)
    both = torch.cat([places, left + token[: odd.shape[1]].expand(keys.shape[0], -1)], dim=1)
    return both[:, token // 2 + token % 2 * even.shape[1]]


def merge(x: Tensor, size: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Average tokens [B,N,C] by their sizes [B,N] into `count` places; return these and their sizes."""
    merged = size.new_zeros(x.shape[0], count).scatter_add(1, places, size)
    index = places[..., None].expand_as(x)
    total = x.new_zeros(x.shape[0], count, x.shape[-1]).scatter_add(1, index, x * size[..., None])
    return total / merged[..., None], merged


class ToMe(AdaptiveViT):
    """Plain ViT, except:

    - between attention and MLP of every block `r` tokens merge into similar ones, an average weighted by
      how many patches each already stands for (section 3);
    - attention is proportional: the logarithm of a token's size is added to the logits of its key.

    `info`: `token_size` [B,N] patches per token; `token_group` [B,N] for each token that entered the first
    block the one at the end that it is part of.

    Args:
        r: tokens that each block merges away, at most half of its patches; may be changed at any time.
        falling: merge 2 r in the first block and linearly fewer down to none in the last (section 4.1).

    Raises:
        InputError: r is below 0.
    """

    knobs = {"r": Knob(int, 0, 128)}
    flags = (
        Flag("--r", "ToMe: tokens that every block merges away", int),
        Flag("--falling", "ToMe: merge more in the first blocks and none in the last", bool),
    )

    def __init__(self, r: int = 13, falling: bool = False, **vit):
        if r < 0:
            raise InputError(f"r is {r}: take a whole number from 0 up")
        super().__init__(**vit)
        self.r, self.falling = r, falling

    def key_bias(self, info: dict[str, Tensor]) -> Tensor | None:
        return info["token_size"].log()[:, None, None] if "token_size" in info else None

    def reduce(self, x: Tensor, block: Block, i: int, info: dict[str, Tensor]) -> Tensor:
        last = max(len(self.blocks) - 1, 1)
        r = 2 * self.r * (last - i) // last if self.falling else self.r
        r = min(r, (x.shape[1] - self.num_prefix_tokens) // 2)
        x, keys = block.attend(x, self.key_bias(info), need="keys")
        if r > 0:
            places = match(keys, r, self.num_prefix_tokens)
            size = info.get("token_size", x.new_ones(x.shape[:2]))
            x, info["token_size"] = merge(x, size, places, x.shape[1] - r)
            if "places" in info:  # a merged token stands where its odd one stood
                before = info["places"]
                after = before.new_zeros(x.shape[:2]).scatter(1, places[:, ::2], before[:, ::2])
                info["places"] = after.scatter(1, places[:, 1::2], before[:, 1::2])
            info["token_group"] = places.gather(1, info["token_group"]) if "token_group" in info else places
        return block.feed(x)

    def picture(self, info: dict[str, Tensor]) -> Picture:
        groups = info["token_group"][:, self.num_prefix_tokens :] if "token_group" in info else None
        return super().picture(info)._replace(groups=groups)


register_reducer("tome", ToMe)
register("tome_deit_small", ToMe, "ToMe on DeiT-S.")
register("tome_deit_base", ToMe, "ToMe on DeiT-B.", embed_dim=768, num_heads=12)
register("tome_deit_nano", ToMe, "ToMe at the size of the embedded data set.", **NANO, img_size=56, r=24)
