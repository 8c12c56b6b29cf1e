"""Early exit on a model with scripted exits, and statistics against loops."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from engine import Precision, cascade, early_exit, predict
from inference.streaming import ExitStream
from loading.loaders import Shard
from models import Adaptive, StageOutput
from models.cost import stage_gflops
from models.exits import (
    Predictions,
    budget_threshold,
    choose_exits,
    confidence,
    operating_points,
    uniform_thresholds,
)
from models.registry import registered
from models.weights import cast_weights
from utils import InputError


class Scripted(Adaptive):
    """The image itself says how sure each of three exits is of which class.

    images [B,3,1,2]: channel k holds (class, logit of that class) of exit k. Every stage notes whom it saw.
    """

    num_exits = 3

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def stage(self, k: int, images: Tensor, prev: dict[str, Tensor]) -> StageOutput:
        if k:  # info has to follow its image
            assert torch.equal(prev["first"], images[:, 0, 0, 0])
        self.seen.append(len(images))
        label, logit = images[:, k, 0].unbind(-1)
        logits = torch.zeros(len(images), 5)
        logits[torch.arange(len(images)), label.long()] = logit
        return StageOutput(logits, {"first": images[:, 0, 0, 0]})


def scripted_images(batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (batch, 3), generator=generator)
    return torch.stack([labels.float(), 6 * torch.rand(batch, 3, generator=generator)], dim=-1)[:, :, None]


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
@pytest.mark.parametrize("thresholds", [[0.5, 0.5], [0.9, 0.3], [0.0, 0.0], [1.1, 1.1], [1.1, 0.6]])
def test_early_exit_is_the_full_forward_at_the_exit_taken(batch: int, thresholds: list[float]) -> None:
    model, images = Scripted(), scripted_images(batch)
    full = model(images)
    logits, exits = early_exit(model, images, thresholds)
    for row in range(batch):
        sure = [confidence(out.logits[row : row + 1]).item() for out in full]
        expected = next(k for k in range(3) if k == 2 or sure[k] >= thresholds[k])
        assert exits[row] == expected
        assert torch.equal(logits[row], full[expected].logits[row])
    assert exits.dtype == torch.int64


def test_later_stages_see_only_the_undecided() -> None:
    model, images = Scripted(), scripted_images(50)
    _, exits = early_exit(model, images, [0.6, 0.6])
    assert model.seen == [50, int((exits > 0).sum()), int((exits > 1).sum())]


def test_no_later_stage_runs_when_all_leave() -> None:
    model = Scripted()
    _, exits = early_exit(model, scripted_images(9), [0.0, 0.0])
    assert model.seen == [9] and (exits == 0).all()


def test_steps_of_a_cascade_partition_the_batch() -> None:
    left = [step.rows[step.leaves] for step in cascade(Scripted(), scripted_images(40), [0.5, 0.7])]
    assert torch.cat(left).sort().values.tolist() == list(range(40))


def test_a_wrong_number_of_thresholds_is_refused() -> None:
    with pytest.raises(ValueError, match="1 thresholds given, the model has 2"):
        early_exit(Scripted(), scripted_images(2), [0.5])


@pytest.mark.parametrize("world", [1, 2, 5])
def test_predictions_match_a_loop_over_images(world: int) -> None:
    images, target = scripted_images(23, seed=1), torch.randint(0, 5, (23,))
    dataset, model = TensorDataset(images, target), Scripted()
    merged = torch.zeros(23, 3)
    for rank in range(world):  # each process fills its own rows and leaves the others at 0
        loader = DataLoader(Shard(dataset, rank, world), batch_size=4)
        merged += predict(model, loader, Precision(torch.device("cpu"))).confidence
    expected = torch.stack([confidence(out.logits) for out in model(images)], dim=1)
    assert torch.allclose(merged, expected)


def some_predictions(n: int = 300, exits: int = 3) -> Predictions:
    generator = torch.Generator().manual_seed(3)
    sure = torch.rand(n, exits, generator=generator).mul(20).round().div(20)  # coarse values: ties occur
    correct = torch.rand(n, exits, generator=generator) < 0.7
    return Predictions(sure, correct, correct, torch.zeros(n, exits))


def test_operating_points_match_a_loop() -> None:
    predictions, gflops = some_predictions(), [1.0, 2.5, 4.0]
    thresholds = torch.cat([uniform_thresholds(21, 3), torch.rand(10, 2)])
    curve = operating_points(predictions, thresholds, gflops)
    for t, row in enumerate(thresholds.tolist()):
        cost = right = 0.0
        for sure, correct in zip(predictions.confidence.tolist(), predictions.correct.tolist(), strict=True):
            k = next(k for k in range(3) if k == 2 or sure[k] >= torch.tensor(row[k]).item())
            cost, right = cost + gflops[k], right + correct[k]
        assert curve.gflops[t].item() == pytest.approx(cost / 300)
        assert curve.accuracy[t].item() == pytest.approx(100 * right / 300)
    assert torch.allclose(curve.shares.sum(dim=1), torch.ones(31, dtype=torch.float64))


def test_the_sweep_runs_from_the_first_exit_to_the_last() -> None:
    predictions = some_predictions()
    predictions = predictions._replace(confidence=predictions.confidence.clamp(0.05, 0.95))
    curve = operating_points(predictions, uniform_thresholds(101, 3), [1.0, 2.0, 3.0])
    accuracy = 100 * predictions.correct.double().mean(dim=0)
    assert (curve.gflops[0], curve.accuracy[0]) == (1.0, accuracy[0])
    assert (curve.gflops[-1], curve.accuracy[-1]) == (3.0, accuracy[2])
    assert (curve.gflops.diff() >= 0).all()


def test_a_single_exit_takes_every_image() -> None:
    assert (choose_exits(torch.rand(5, 1), torch.zeros(2, 0)) == 0).all()


@pytest.mark.parametrize("budget", [1.0, 1.3, 2.0, 3.1, 4.0, 9.0])
def test_budget_threshold_is_the_highest_that_fits(budget: float) -> None:
    predictions, gflops = some_predictions(), [1.0, 2.5, 4.0]
    threshold = budget_threshold(predictions, gflops, budget)

    def cost(value: float) -> float:
        return operating_points(predictions, torch.full((1, 2), value), gflops).gflops.item()

    assert cost(threshold) <= budget
    higher = [level for level in predictions.confidence[:, :2].unique().tolist() if level > threshold]
    assert all(cost(level) > budget for level in higher)


def test_a_budget_below_the_first_exit_is_refused() -> None:
    with pytest.raises(ValueError, match="below the cost of the first exit"):
        budget_threshold(some_predictions(), [1.0, 2.0, 3.0], 0.5)


def small(name: str) -> Adaptive:
    """A registered model, those of full size with few and narrow blocks."""
    narrow = {} if name.endswith("nano") else dict(embed_dim=16, depth=2, num_heads=2)
    return timm.create_model(name, num_classes=10, **narrow).eval()


@pytest.mark.parametrize("name", [*(name for name in registered if name.endswith("nano")), "dvt_t2t_vit_12"])
def test_an_empty_batch_has_empty_outputs_like_any_other(name: str) -> None:
    model = small(name)
    images = torch.zeros(1, 3, model.img_size, model.img_size)
    with torch.inference_mode():
        for k, (empty, other) in enumerate(zip(model(images[:0]), model(images), strict=True)):
            assert empty.logits.shape == (0, 10)
            shapes = {
                key: (value.shape[0], *value.shape[1:], value.dtype) for key, value in empty.info.items()
            }
            assert shapes == {key: (0, *value.shape[1:], value.dtype) for key, value in other.info.items()}
            cost = model.image_gflops(k, empty.info)
            assert cost is None or cost.shape == (0,)
    logits, exits = early_exit(model, images[:0], [0.5] * (model.num_exits - 1))
    assert logits.shape == (0, 10) and exits.shape == (0,)
    stream = ExitStream(model, Precision(torch.device("cpu")), [0.5] * (model.num_exits - 1), 2, pad=True)
    assert [len(taken) for _, taken in stream([images[:0], images, images[:0]])] == [0, 1, 0]
    assert all(len(output.logits) == 0 for output in model.train()(images[:0]))


class CastParameters(TorchDispatchMode):
    """Names the types of the weights, of more than one dimension, that are cast while it is entered."""

    def __init__(self, model: Adaptive):
        super().__init__()
        self.own = {value.data_ptr() for value in model.parameters() if value.dim() > 1}
        self.types: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.own:
            self.types.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


CPU_BF16 = Precision.inference(torch.device("cpu"), None, "bf16")


@pytest.mark.parametrize("name", [*(name for name in registered if name.endswith("nano")), "dvt_t2t_vit_12"])
def test_weights_cast_once_give_what_autocast_gives(name: str) -> None:
    """To the last bit, so the exits are the same."""
    torch.manual_seed(0)
    model = small(name)
    images = torch.rand(3, 3, model.img_size, model.img_size)
    thresholds = [1 / 10 + 0.02] * (model.num_exits - 1)
    results, casts = [], []
    for _ in range(2):
        with CPU_BF16.autocast(), torch.no_grad():
            with CastParameters(model) as cast:
                outputs = model(images)
            results.append([*(out.logits for out in outputs), *early_exit(model, images, thresholds)])
        casts.append(cast.types)
        cast_weights(model, CPU_BF16.weights)
    assert all(map(torch.equal, *results))
    assert casts[0].count(torch.float32) > 4 and casts[1] == []
    norms = {part.weight.dtype for part in model.modules() if isinstance(part, torch.nn.LayerNorm)}
    alone = {
        value.dtype
        for part in model.modules()
        if hasattr(part, "float32_only")
        for value in part.parameters()
    }
    assert norms == {torch.float32} and alone == ({torch.float32} if name == "dvt_t2t_vit_12" else set())


def test_weights_of_one_type_are_not_computed_with_in_another() -> None:
    cpu, model = torch.device("cpu"), small("lf_deit_nano")
    gflops = stage_gflops(model)
    cast_weights(model, torch.bfloat16)
    assert stage_gflops(model) == gflops  # counted in float32
    assert (CPU_BF16.dtype, CPU_BF16.weights) == (torch.bfloat16, torch.bfloat16)
    assert Precision.inference(cpu, "bf16", "bf16") == CPU_BF16
    assert all(Precision.inference(cpu, amp, "fp32") == Precision(cpu) for amp in (None, "none"))
    for amp, weights in (("fp16", "bf16"), ("none", "bf16"), ("bf16", "fp16")):
        with pytest.raises(InputError, match=f"--weights {weights} computes in {weights}: not with --amp"):
            Precision.inference(cpu, amp, weights)
