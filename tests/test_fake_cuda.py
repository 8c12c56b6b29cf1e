"""Models on CUDA without a GPU: fake tensors have shape, type and device, and no values."""

from collections import Counter
from collections.abc import Iterator

import pytest
import timm
import torch
from cases import FakeCuda
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import models.a_vit
from engine import Objective, Precision, backward, early_exit, predict
from inference.streaming import ExitStream
from loading.loaders import Shard
from models import Adaptive
from models.registry import reducers, registered

# One name per size: others are aliases.
NAMES = list({timm.model_entrypoint(name): name for name in reversed(registered)}.values())
NANO = [name for name in NAMES if name.endswith("nano")]
CASES = [(name, {}) for name in NANO]
CASES += [(name, {"reducer": reducer}) for name in ("lf_deit_nano", "dvt_deit_nano") for reducer in reducers]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    with FakeCuda(monkeypatch) as mode:
        yield mode


def images_of(model: Adaptive, batch: int) -> Tensor:
    return torch.zeros(batch, 3, model.img_size, model.img_size)


def train(cuda: FakeCuda, model: Adaptive, precision: Precision, blocks: int) -> None:
    """One forward pass and loss, with mixup; autograd has no part in it."""
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=model.num_classes)
    batch = [images_of(model, 2), torch.arange(2)]
    model.train()
    objective = Objective(SoftTargetCrossEntropy(), mixup)
    scalars = backward(model, precision, batch, objective, precision.scaler(), 1)
    assert all(value.is_cuda and not value.shape for value in scalars.values())
    model.eval()


def exit_early(cuda: FakeCuda, model: Adaptive, precision: Precision, blocks: int) -> None:
    """Early exit on one batch: the host waits once per early stage."""
    thresholds, (images,) = [0.5] * (model.num_exits - 1), precision.place([images_of(model, 4)])
    cuda.waits.clear()
    with precision.autocast():
        logits, exits = early_exit(model, images, thresholds)
    assert logits.is_cuda and exits.is_cuda and logits.shape == (4, model.num_classes)
    assert cuda.waits == Counter(nonzero=len(thresholds), tolist=blocks)


def stream(cuda: FakeCuda, model: Adaptive, precision: Precision, blocks: int) -> None:
    """Early exit over two batches: the host waits for one event per decision."""
    thresholds, (images,) = [0.5] * (model.num_exits - 1), precision.place([images_of(model, 4)])
    cuda.waits.clear()
    results = list(ExitStream(model, precision, thresholds, 4)([images, images[:1]]))
    assert [len(logits) for logits, _ in results] == [4, 1]
    assert all(value.is_cuda for result in results for value in result)
    # Half of a batch goes on: stage 0 decides twice, a later one when its queue is flushed.
    assert cuda.waits == Counter(event=len(thresholds) and 1 + len(thresholds), tolist=2 * blocks)


def predict_all(cuda: FakeCuda, model: Adaptive, precision: Precision, blocks: int) -> None:
    """All stages on a data set: the host waits for no batch, and at the end for the table."""
    dataset = TensorDataset(images_of(model, 2), torch.arange(2))
    cuda.waits.clear()
    table = predict(model, DataLoader(Shard(dataset), 2), precision)
    assert table.confidence.shape == (2, model.num_exits)
    # At the end the numbers of the images go to the device, twice, and the table comes back.
    assert cuda.waits == Counter(to_cuda=2, to_cpu=1, tolist=blocks)


def test_one_image_alone_waits_for_its_exit_alone(cuda: FakeCuda) -> None:
    model = timm.create_model("lf_deit_nano").eval()
    cuda.move(model, torch.contiguous_format)
    results = ExitStream(model, Precision(torch.device("cuda")), [0.5], 1)([images_of(model, 1).to("cuda")])
    cuda.waits.clear()
    ((logits, exits),) = results
    assert logits.is_cuda and exits.is_cuda and cuda.waits == {"item": 1}


@pytest.mark.parametrize("name, kwargs", CASES, ids=str)
def test_nano_models_run_in_every_precision(cuda: FakeCuda, name: str, kwargs: dict) -> None:
    model = timm.create_model(name, num_classes=5, depth=3, **kwargs).eval()
    blocks = len(model.blocks) if name.startswith("avit") else 0  # blocks that the host waits in
    runs = [
        ("none", False, [train, predict_all]),
        ("bf16", True, [train, stream]),
        ("fp16", True, [exit_early]),
    ]
    if kwargs:
        runs = [("bf16", True, [train, exit_early])]
    for amp, channels_last, steps in runs:
        precision = Precision.of(torch.device("cuda"), amp, channels_last)
        cuda.move(model, precision.memory_format)
        for step in steps:
            step(cuda, model, precision, blocks)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NANO])
def test_full_sizes_train(cuda: FakeCuda, name: str) -> None:
    """At full width and image size, with three blocks: all blocks are alike."""
    with torch.device("meta"):
        model = timm.create_model(name, depth=3)
    precision = Precision.of(torch.device("cuda"), "fp16", channels_last=True)
    cuda.move(model, precision.memory_format)
    train(cuda, model, precision, 0)


def test_packed_attention_is_flash_whose_plans_do_not_follow_the_data(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, real = [], models.a_vit.varlen_attn

    def spy(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, *longest: int) -> Tensor:
        assert torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.cudnn_sdp_enabled()
        assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
        assert starts.dtype == ends.dtype == torch.int32
        seen.append((len(q), (starts.shape, *longest)))
        return real(q, k, v, starts, ends, *longest)

    dense = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(models.a_vit, "varlen_attn", spy)
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, *others, **options: (dense.append(q.shape), sdpa(q, *others, **options))[1],
    )
    model = timm.create_model("avit_deit_nano").eval()
    cuda.move(model, torch.contiguous_format)
    with torch.autocast("cuda", torch.bfloat16), torch.inference_mode():
        for _ in range(2):
            model(images_of(model, 4).to("cuda"))
    assert len({rows for rows, _ in seen}) > 5 and {shapes for _, shapes in seen} == {((5,), 197, 197)}
    assert set(dense) == {(4, 4, 197, 16)}  # the first block, of all tokens
    # Without flash all sequences are padded to the same length.
    seen.clear()
    dense.clear()
    with torch.inference_mode():
        for _ in range(2):
            model(images_of(model, 4).to("cuda"))
    assert not seen and set(dense) == {(4, 4, 197, 16)} and len(dense) == 8


def test_what_lies_on_the_cpu_is_noticed(cuda: FakeCuda) -> None:
    on_cuda, table = torch.zeros(4, 3, device="cuda"), torch.arange(2)
    with pytest.raises(AssertionError, match="on the CPU and on CUDA"):
        on_cuda[table]
    with pytest.raises(AssertionError, match="on the CPU and on CUDA"):
        on_cuda + torch.zeros(3)
