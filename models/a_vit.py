"""A-ViT: every token of every image halts at a depth of its own, decided by its first channel.

Halting scores add up over the blocks; a token whose sum reaches the threshold takes no part in later blocks,
and the class token's outputs, weighted by its scores, are what is classified.
Yin et al., "A-ViT: Adaptive Tokens for Efficient Vision Transformer", CVPR 2022, arXiv 2112.07658.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.cost import token_gflops
from models.registry import register
from models.vit import NANO, AdaptiveViT, Block, Flag, Knob, Picture, StageOutput
from models.weights import file_name_readers
from utils import InputError

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None

THRESHOLD = 0.99  # 1 - epsilon of the paper: the sum of halting scores at which a token stops
MASKED = -1000.0  # added to the attention logits of halted tokens, whose weight is then exactly 0 in float32


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, lengths: list[int], longest: int
) -> Tensor:
    """Attend within each of several sequences that lie one after the other.

    On a GPU no shape but T follows the data: libraries keep a plan for every shape that they meet.

    Args:
        q, k, v: [T,H,d] each, as is the result.
        bounds: [B+1] where the sequences begin and end: 0, sums of the first lengths, T.
        lengths: of the sequences, zeros allowed, or none at all; their sum is T.
        longest: what a sequence can have at most, whatever these have.
    """
    if not any(lengths):
        return v
    if q.device.type == "cpu":
        return attend_in_turn(q, k, v, [n for n in lengths if n])
    if min(lengths) == longest:
        return attend_equal(q, k, v, longest)
    flash = q.is_cuda and q.element_size() == 2 and q.shape[-1] % 8 == 0 and varlen_attn is not None
    if flash and torch.cuda.get_device_capability(q.device) >= (8, 0):
        q, k, v = torch.stack((q, k, v))  # contiguous: the first versions misread other strides
        # Left to itself it takes cuDNN on some GPUs, which makes and keeps a plan for every T.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return varlen_attn(q, k, v, bounds.int(), bounds.int(), longest, longest)
    return attend_padded(q, k, v, bounds, longest)


def attend_equal(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """Return what `attend_packed` does, where all sequences have one length."""
    batch = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))  # [B,H,n,d] each
    return F.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1)


def attend_in_turn(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Return what `attend_packed` does, by one call per sequence where lengths, all above 0, differ.

    On a CPU this is fastest: a padded batch needs a mask, which costs more than it saves.
    """
    if min(lengths) == max(lengths):
        return attend_equal(q, k, v, lengths[0])
    parts = (x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v))  # [H,n,d] each
    outs = [F.scaled_dot_product_attention(*(x[None] for x in qkv)) for qkv in zip(*parts, strict=True)]
    return torch.cat(outs, dim=2)[0].transpose(0, 1).contiguous()


def attend_padded(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Return what `attend_packed` does, with all sequences padded to `longest`."""
    valid = torch.arange(longest, device=q.device) < bounds.diff()[:, None]  # [B,n]
    rows = valid.flatten().nonzero_static(size=len(q))[:, 0]
    bias = q.new_zeros(valid.shape).masked_fill(~valid, MASKED)[:, None, None]
    padded = (x.new_zeros(valid.numel(), *x.shape[1:]).index_copy(0, rows, x) for x in (q, k, v))
    batch = (x.unflatten(0, valid.shape).transpose(1, 2) for x in padded)  # [B,H,n,d] each
    return F.scaled_dot_product_attention(*batch, attn_mask=bias).transpose(1, 2).flatten(0, 1)[rows]


def halting_prior(depth: int) -> Tensor:
    """Return the target of the halting scores, [L] float32: a normal density around two thirds of the depth.

    As published for 12 blocks: deviation 1, normalised over the blocks before the peak, its sum is above 1.
    """
    centre = max(1, 2 * depth // 3)
    density = (-0.5 * (torch.arange(depth, dtype=torch.float64) - centre) ** 2).exp()
    return (0.98 * density / density[:centre].sum()).float()


def prior_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of halting scores from their prior, divided by L as published.

    Args:
        scores: [B,L] mean halting score of each image's tokens after each block.
        target: [L], see `halting_prior`.
    """
    mean = scores.float().mean(dim=0)
    share = (mean / mean.sum().clamp(min=torch.finfo(mean.dtype).tiny)).clamp(0.01, 0.99)
    return F.kl_div(share.log(), target, reduction="batchmean")  # the first dimension, here L, is the batch


def read_file_name(path: Path) -> dict[str, Any]:
    """Return what the name of a published file tells: `model_name`, and the gate as `model_kwargs`.

    As small-10-75.pth for a scale of 10 and a center of 75.
    """
    entries: dict[str, Any] = {}
    if size := re.search("tiny|small", path.stem):
        entries["model_name"] = f"avit_deit_{size[0]}"
    number = r"-(\d+(?:\.\d+)?)"
    gate = re.search(rf"(?:^|-)[^-]*[A-Za-z][^-]*{number}{number}$", path.stem)
    values = gate.groups() if gate else None
    if path.stem == "visualization-tiny":  # the published demo's file, whose name does not tell its gate
        values = 5, 50
    if values:
        entries["model_kwargs"] = dict(zip(("gate_scale", "gate_center"), map(float, values), strict=True))
    return entries


file_name_readers.append(read_file_name)


class AViT(AdaptiveViT):
    """Plain ViT without new parameters, except:

    - after each block, channel 0 of a token gives its score h = sigmoid(gate_scale * x[0] - gate_center); a
      token, the class token included, halts where the sum of its scores reaches 0.99 or the blocks end;
    - halted tokens leave the computation. Training keeps them as masked zeros, with the same results, because
      the prior reads their scores; so does a traced or compiled model, whose shapes must not follow the data;
    - the head reads the sum of the class token's outputs, each weighted by its score and the last by the
      remainder to 1.

    `info`: `depth` [B,N] int64, blocks executed per token; `rho` [B,N], ponder cost, depth plus remainder;
    `tokens` [B,L] int64, live tokens that enter each block; in training `scores` [B,L], mean over all tokens.

    Args:
        gate_scale: slope of the gate; may be changed after construction, as may gate_center.
        gate_center: subtracted as it is, not multiplied by the slope.
        ponder_token_scale: weight of the mean ponder cost in the loss.
        distr_prior_alpha: weight of the halting prior in the loss; 0 or less for none.
        stop_at_class_token: in evaluation an image ends where its class token halts. Logits stay the same and
            its other tokens cost nothing more; `depth`, `rho` and `tokens` then tell what was executed.

    Raises:
        InputError: gate_scale, gate_center or ponder_token_scale is out of range.
    """

    knobs = {"gate_center": Knob(float, -200.0, 200.0), "gate_scale": Knob(float, 0.0, 1000.0)}
    # What lies between these two has the number of rows on the host.
    compiled = {"project": {"dynamic": True}, "finish": {"dynamic": True}}
    flags = (
        Flag("--gate_scale", "A-ViT: slope of the halting gate"),
        Flag("--gate_center", "A-ViT: offset of the halting gate; less halts earlier"),
        Flag("--ponder_token_scale", "A-ViT: weight of the mean depth of tokens in the loss"),
        Flag("--distr_prior_alpha", "A-ViT: weight of the halting prior in the loss; 0 for none"),
    )

    def __init__(
        self,
        gate_scale: float = 10.0,
        gate_center: float = 30.0,
        ponder_token_scale: float = 5e-4,
        distr_prior_alpha: float = 1e-3,
        stop_at_class_token: bool = False,
        **vit,
    ):
        scales = dict(gate_scale=gate_scale, gate_center=gate_center, ponder_token_scale=ponder_token_scale)
        for name, value in scales.items():
            if not 0 <= value < math.inf:
                raise InputError(f"{name} is {value}: take a number from 0 up")
        super().__init__(**vit)
        self.gate_scale, self.gate_center = gate_scale, gate_center
        self.ponder_token_scale, self.distr_prior_alpha = ponder_token_scale, distr_prior_alpha
        self.stop_at_class_token = stop_at_class_token
        self.register_buffer("prior", halting_prior(len(self.blocks)), persistent=False)

    def run(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the blocks on tokens [B,N,C]; return the weighted sum [B,C] of the class token's outputs."""
        static = self.training or torch.jit.is_tracing() or torch.compiler.is_compiling()
        out, info = self.masked(x) if static else self.packed(x)
        return out.to(x.dtype), info

    def read_out(self, x: Tensor, info: dict[str, Tensor]) -> StageOutput:
        return StageOutput(self.head(self.norm(x)), info)

    def image_gflops(self, k: int, info: dict[str, Tensor]) -> Tensor:
        return token_gflops(self, info["tokens"])

    def picture(self, info: dict[str, Tensor]) -> Picture:
        depth = info["depth"][:, self.num_prefix_tokens :]
        return super().picture(info)._replace(depth=depth, blocks=len(self.blocks))

    def halt(self, i: int, x: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scores of the tokens [...,C] after block i, their sums [...] so far, and which halt."""
        score = torch.sigmoid(self.gate_scale * x[..., 0].float() - self.gate_center)
        total = total + score
        return score, total, total >= (0 if i == len(self.blocks) - 1 else THRESHOLD)

    def masked(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `run` of tokens [B,N,C] and the info, with halted tokens as zeros."""
        rest = torch.ones(x.shape[:2], device=x.device)  # 1 - the scores so far, until the token halts
        total, live, out = torch.zeros_like(rest), torch.ones_like(rest, dtype=torch.bool), 0.0
        entered, scores = [], []
        for i, block in enumerate(self.blocks):
            entered.append(live)
            mask = live[..., None].to(x.dtype)
            x = x - (x * (1 - mask)).detach()  # zero in value only: the gradient passes
            bias = MASKED * (1 - mask).transpose(1, 2)[:, None]  # [B,1,1,N]
            # Masked after the norms, whose biases are not zero.
            x = block.residual(x, block.attn(block.norm1(x) * mask, bias)[0])
            x = block.residual(x, block.mlp(block.norm2(x) * mask))
            score, total, halted = self.halt(i, x, total)
            scores.append(score.mean(dim=1))
            weight = torch.where(halted, rest, score) * live
            out = out + weight[:, :1] * x[:, 0]
            rest = torch.where(halted, rest, rest - score)
            live = live & ~halted
        table = torch.stack(entered, dim=2)  # [B,N,L]
        info = {"depth": table.sum(dim=2), "tokens": table.sum(dim=1), "scores": torch.stack(scores, dim=1)}
        return out, info | {"rho": info["depth"] + rest}

    def packed(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what `masked` does, without the halted tokens: live ones are rows [T,C] of one matrix.

        The host waits for the device once per block, to learn how many tokens of each image go on.
        """
        batch, n = x.shape[:2]
        x = x.flatten(0, 1)
        place = torch.arange(len(x), device=x.device)  # [T], where in [B,N] the row comes from
        first, counts, lengths = place[::n], torch.full((batch,), n, device=x.device), [n] * batch
        rest = torch.ones(len(x), device=x.device)
        total, depth, remainder, out = torch.zeros_like(rest), torch.zeros_like(place), rest, 0.0
        tokens = counts.new_zeros(batch, len(self.blocks))
        for i, block in enumerate(self.blocks):
            tokens[:, i] = counts
            bounds = F.pad(counts.cumsum(0), (1, 0))  # [B+1]
            # Compiled methods would be compiled once more for a single row.
            own = self if len(x) > 1 else type(self)
            x = own.finish(block, x, attend_packed(*own.project(block, x), bounds, lengths, n))
            score, total, halted = self.halt(i, x, total)
            weight = torch.where(halted, rest, score)
            # The first row of an image is its class token, unless that has halted.
            start = bounds[:-1].clamp(max=len(x) - 1)
            present = place[start] == first
            out = out + (weight[start] * present)[:, None] * x[start]
            depth, remainder = depth.index_fill(0, place, i + 1), remainder.index_copy(0, place, rest)
            image, live = place // n, ~halted
            if self.stop_at_class_token:
                live = live & live[start][image]  # who is left has its class token
            counts = torch.zeros_like(counts).index_add(0, image, live.long())
            lengths = counts.tolist()  # the wait
            if not any(lengths):
                break
            rest = rest - score
            if sum(lengths) < len(x):
                stay = live.nonzero_static(size=sum(lengths))[:, 0]
                x, place, total, rest = (rows[stay] for rows in (x, place, total, rest))
        rho = depth + remainder
        return out, {"depth": depth.view(batch, n), "rho": rho.view(batch, n), "tokens": tokens}

    @staticmethod
    def project(block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values [T,H,d] of packed rows [T,C]."""
        return block.attn.qkv(block.norm1(x)).unflatten(1, (3, block.attn.num_heads, -1)).unbind(1)

    @staticmethod
    def finish(block: Block, x: Tensor, out: Tensor) -> Tensor:
        """Run the rest of a block on packed rows [T,C] and what was attended to, [T,H,d]."""
        return block.feed(block.residual(x, block.attn.proj(out.flatten(1))))

    def loss(
        self, outputs: list[StageOutput], target: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Return the criterion, the mean ponder cost, and in training the loss of the halting prior."""
        logits, info = outputs[0]
        terms = {"ce": criterion(logits, target), "ponder": self.ponder_token_scale * info["rho"].mean()}
        if self.distr_prior_alpha > 0 and "scores" in info:
            terms["prior"] = self.distr_prior_alpha * prior_loss(info["scores"], self.prior).clamp(min=0)
        return terms

    def statistics(self, outputs: list[StageOutput]) -> dict[str, Tensor]:
        """Return what a log should show of a batch, as scalars under the published names.

        `cnt_token_*` are of blocks per token (`diff`: largest minus smallest of an image, mean over images),
        `expected_depth_ratio` is the mean over L, `live_tokens_<i>` the mean of tokens that enter block i.
        """
        depth, tokens = (outputs[0].info[name].float() for name in ("depth", "tokens"))
        low, high = depth.aminmax(dim=1)
        count = {"mean": depth.mean(), "max": high.max(), "min": low.min(), "diff": (high - low).mean()}
        found = {f"cnt_token_{name}": value for name, value in count.items()}
        found |= {f"live_tokens_{i}": mean for i, mean in enumerate(tokens.mean(dim=0))}
        return found | {"expected_depth_ratio": depth.mean() / len(self.blocks)}


TINY, TINY_RECIPE = dict(embed_dim=192, num_heads=3), dict(epochs=100, batch_size=128)
SMALL_RECIPE = dict(epochs=100, batch_size=96, lr=3e-4)
names = "avit_deit_tiny avit_tiny_patch16_224", "avit_deit_small avit_small_patch16_224"
register(names[0], AViT, "A-ViT on DeiT-Ti.", recipe=TINY_RECIPE, **TINY)
register(names[1], AViT, "A-ViT on DeiT-S.", recipe=SMALL_RECIPE, gate_center=75.0)
# A lower center: in a run of two epochs the published ones let hardly any token halt.
text = "A-ViT at the size of the embedded data set."
register("avit_deit_nano", AViT, text, **NANO, img_size=56, gate_center=10.0)
