"""What only a GPU can show: the numbers of the CPU, replayed graphs, NCCL; left out where there is none.

CHECKED_DEVICE=cpu runs what a CPU can: scripts/acceptance.py does so at a smaller size.
"""

import os
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine import Precision, early_exit
from inference.streaming import ExitStream, all_stages, compile_models, uncompile
from models import Adaptive
from models.exits import confidence
from models.registry import registered

DEVICE = torch.device(os.environ.get("CHECKED_DEVICE", "cuda"))
ON_CUDA = pytest.mark.skipif(DEVICE.type != "cuda", reason="of CUDA alone")
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no GPU"
)
NAMES = sorted(
    name for name, (cls, _) in registered.items() if name.endswith("nano") and "models." in cls.__module__
)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Products of float32 are of float32, not of TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def build(name: str) -> tuple[Adaptive, Tensor]:
    """A small model with fixed weights on the CPU, and images for it, some far simpler than others."""
    torch.manual_seed(0)
    model = timm.create_model(name, embed_dim=64, depth=3, num_heads=2).eval()
    images = (
        torch.rand(12, 3, model.img_size, model.img_size) * torch.linspace(0.1, 2, 12)[:, None, None, None]
    )
    return model, images


@torch.inference_mode()
def logits_of(model: Adaptive, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    with Precision(images.device, dtype).autocast():
        return torch.stack([output.logits.float() for output in model(images)]).cpu()  # [E,B,K]


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_that_of_the_cpu(name: str) -> None:
    model, images = build(name)
    expected = logits_of(model, images)
    torch.testing.assert_close(logits_of(model.to(DEVICE), images.to(DEVICE)), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_near_float32_of_the_cpu(name: str) -> None:
    """On the mean: where two tokens are nearly equal, the other one may be kept."""
    model, images = build(name)
    expected = logits_of(model, images)
    got = logits_of(model.to(DEVICE), images.to(DEVICE), torch.bfloat16)
    assert (got - expected).abs().mean() < 0.1 * expected.std()


@pytest.mark.parametrize("name", NAMES)
def test_the_stream_is_early_exit(name: str) -> None:
    model, images = build(name)
    model, images = model.to(DEVICE), images.to(DEVICE)
    # Half of the images leave at each early exit, by thresholds between two confidences.
    with torch.inference_mode():
        sure = [confidence(output.logits).sort()[0] for output in model(images)[:-1]]
    thresholds = [((values[5] + values[6]) / 2).item() for values in sure]
    expected, exits = early_exit(model, images, thresholds)
    stream = ExitStream(model, Precision(DEVICE), thresholds, 5)
    logits, taken = (torch.cat(parts) for parts in zip(*stream(images.split([5, 1, 4, 2])), strict=True))
    assert torch.equal(taken, exits) and (not thresholds or 0 < (exits == 0).sum() < 12)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@ON_CUDA
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_replayed_on_other_images_gives_their_answers(name: str) -> None:
    model, images = build(name)
    model, images = model.to(DEVICE), images.to(DEVICE)
    precision, thresholds = Precision(DEVICE), [2.0] * (model.num_exits - 1)  # no image leaves early
    expected = early_exit(model, images, thresholds)[0]
    try:
        assert compile_models({model: all_stages(model, precision, 4)}, "reduce-overhead") is None
        stream = ExitStream(model, precision, thresholds, 4, pad=True)
        for _ in range(3):  # recorded, then replayed
            logits = torch.cat([logits for logits, _ in stream(images.split(4))])
            torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    finally:
        uncompile([model])


def test_halted_tokens_change_nothing_for_the_others() -> None:
    model, images = build("avit_deit_nano")
    model, images = model.to(DEVICE), images.to(DEVICE)
    model.gate_scale, model.gate_center = 5.0, 1.0
    with torch.inference_mode():
        tokens = model.embed(images)
        packed, info = model.packed(tokens)
        masked, full = model.masked(tokens)
    assert 0 < (info["depth"] < info["depth"].max()).sum() and torch.equal(info["depth"], full["depth"])
    torch.testing.assert_close(packed, masked, atol=1e-4, rtol=1e-4)


def test_a_group_of_one(tmp_path: Path) -> None:
    """Its collectives leave a tensor as it is, and a step of DistributedDataParallel is a plain one."""
    model, images = build("deit_nano")
    plain, images = model.to(DEVICE), images.to(DEVICE)
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    store = dist.FileStore(str(tmp_path / "store"), 1)
    bound = torch.device("cuda", 0) if backend == "nccl" else None
    dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=bound)
    try:
        value = torch.arange(5.0, device=DEVICE)
        dist.all_reduce(value)
        assert torch.equal(value.cpu(), torch.arange(5.0))
        objects = [None]
        dist.all_gather_object(objects, {"files": ["a", "b"]})
        assert objects == [{"files": ["a", "b"]}]
        dist.barrier()
        wrapped = nn.parallel.DistributedDataParallel(deepcopy(plain), broadcast_buffers=False)
        for module in (plain, wrapped):
            module(images)[0].logits.square().sum().backward()
        for one, other in zip(plain.parameters(), wrapped.module.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)
    finally:
        dist.destroy_process_group()
