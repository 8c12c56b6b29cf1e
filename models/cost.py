"""GFLOPs of every stage, counted on the code that runs.

As in the papers, one multiply-add is one FLOP. fvcore counts linear layers, convolutions, matrix products and
norms; it skips the fused attention kernel silently, so a handle for it is added here.
"""

import logging
import warnings
from collections import Counter
from copy import deepcopy
from math import prod

import torch
from torch import Tensor, nn

from models.vit import Adaptive, AdaptiveViT
from utils import widest_float

# Operators without multiply-adds of note: element-wise work, reductions, sorting and the moving of data.
CHEAP = {
    "aten::" + name
    for name in """
    add add_ sub rsub mul mul_ div div_ pow neg exp log sum mean softmax log_softmax gelu relu dropout sigmoid
    tanh max min amax argmax argsort sort topk cumsum ceil floor floor_divide remainder clamp where
    max_pool2d avg_pool2d relu_ silu silu_ hardswish hardswish_ hardtanh_ sqrt rsqrt roll
    gather scatter scatter_ unflatten tensor_split index index_select arange repeat expand_as pad ge gt le lt
    eq ne bitwise_not bitwise_and __and__ ones_like zeros_like
    dropout_ im2col unfold repeat_interleave reshape_as clamp_min cos sin
    linalg_vector_norm col2im square hardsigmoid
    new_ones new_zeros scatter_add scatter_reduce index_add minimum maximum abs norm var logical_and
    logical_or logical_not amin aminmax cumprod fill_ one_hot softplus erf rms_norm
    """.split()
}


def attention_macs(inputs: list, outputs: list) -> Counter:
    """Multiply-adds of scaled_dot_product_attention: q k^T and its product with v."""
    q, k, v = (value.type().sizes() for value in inputs[:3])
    return Counter({"attention": prod(q[:-1]) * k[-2] * (q[-1] + v[-1])})


def matmul_macs(inputs: list, outputs: list) -> Counter:
    """Multiply-adds of a product of matrices; fvcore's own handle misses broadcasting of the left."""
    return Counter({"matmul": prod(outputs[0].type().sizes()) * inputs[0].type().sizes()[-1]})


class StageRunner(nn.Module):
    """One stage with tensors in and tensors out; tracing drops the work for what is not returned."""

    def __init__(self, model: Adaptive, k: int, names: list[str]):
        super().__init__()
        self.model, self.k, self.names = model, k, names

    def forward(self, images: Tensor, *info: Tensor) -> list[Tensor]:
        output = self.model.stage(self.k, images, dict(zip(self.names, info, strict=True)))
        return [output.logits, *output.info.values()]


@torch.no_grad()
def stage_gflops(model: Adaptive) -> list[float]:
    """Count the GFLOPs that each stage adds, for one image in evaluation mode.

    Raises:
        RuntimeError: a stage runs an operator that is neither counted nor known to be cheap.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # fvcore's focal loss, unused here, is a scripted function
        from fvcore.nn import FlopCountAnalysis  # imported here: only counting needs it
        from fvcore.nn.jit_handles import elementwise_flop_counter

    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    if any(parameter.dtype.itemsize < 4 for parameter in model.parameters()):  # of `cast_weights`
        model = deepcopy(model).float()
    training = model.training
    model.eval()
    image = torch.zeros(1, 3, model.img_size, model.img_size, device=next(model.parameters()).device)
    costs, info = [], {}
    for k in range(model.num_exits):
        analysis = FlopCountAnalysis(StageRunner(model, k, list(info)), (image, *info.values()))
        analysis.set_op_handle("aten::scaled_dot_product_attention", attention_macs)
        analysis.set_op_handle("aten::matmul", matmul_macs)
        analysis.set_op_handle("aten::upsample_bicubic2d", elementwise_flop_counter(0, 16))  # 4 x 4 pixels
        analysis.tracer_warnings("none").unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        costs.append(analysis.total() / 1e9)
        if unknown := set(analysis.unsupported_ops()) - CHEAP:
            raise RuntimeError(
                f"stage {k} runs operators whose cost is not counted: {', '.join(sorted(unknown))}"
            )
        info = model.stage(k, image, info).info
    model.train(training)
    return costs


def token_gflops(model: AdaptiveViT, tokens: Tensor) -> Tensor:
    """Count the GFLOPs of each image of a plain ViT that tokens leave between blocks, as `stage_gflops` does.

    Its `stage_gflops` are those of an image whose tokens all stay to the last block.

    Args:
        model: on any device.
        tokens: [B,L] tokens that enter each block, the class token included.

    Returns:
        [B] float64; float32 where the device has no more.
    """
    n, dim = tokens.to(widest_float(tokens.device)), model.embed_dim
    layers = [[m.weight.numel() for m in b.modules() if isinstance(m, nn.Linear)] for b in model.blocks]
    norms = 2 * 5 * dim  # fvcore counts 5 per element
    # Filled in place: to copy a list to a device makes the host wait.
    per_token = torch.stack([n.new_full((), sum(sizes) + norms) for sizes in layers])  # [L]
    patches = (model.img_size // model.patch_size) ** 2 * model.patch_embed.proj.weight.numel()
    once = patches + 5 * dim + model.head.weight.numel()
    return (once + (n * per_token + 2 * n**2 * dim).sum(dim=1)) / 1e9


def exit_gflops(model: Adaptive) -> list[float]:
    """Count the cumulative GFLOPs of leaving at each exit, the `flops` of a checkpoint."""
    return torch.tensor(stage_gflops(model), dtype=torch.float64).cumsum(0).tolist()


@torch.inference_mode()
def fit_knob(model: Adaptive, images: Tensor, share: float) -> None:
    """Move a model's first knob to where images cost a share of the most that they can, on average.

    Args:
        model: in evaluation mode; what a stage costs must depend on the image.
        images: [B,3,S,S].
        share: from 0 to 1, of the mean cost at the dearer end of the knob.
    """
    name, (kind, low, high) = next(iter(model.knobs.items()))

    def cost(value: float) -> float:
        setattr(model, name, value)
        costs = [model.image_gflops(k, output.info) for k, output in enumerate(model(images))]
        return sum(cost.mean().item() for cost in costs if cost is not None)

    cheap, dear = sorted((low, high), key=cost)
    wanted = share * cost(dear)
    for _ in range(20):
        middle = kind((cheap + dear) / 2)
        cheap, dear = (cheap, middle) if cost(middle) > wanted else (middle, dear)
    setattr(model, name, dear)
