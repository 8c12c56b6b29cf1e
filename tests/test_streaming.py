"""Exit-aware batching against early exit batch by batch, on scripted exits and on real models."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from test_engine import Scripted, scripted_images
from torch import Tensor
from torch.testing import assert_close

import engine
import inference.streaming
from engine import Precision, cascade, early_exit, padded_size
from inference.streaming import ExitStream, all_stages, compile_models, uncompile
from models.cost import StageRunner, fit_knob
from models.exits import confidence

NAMES = ["lf_deit_nano", "cf_deit_nano", "cf_lvvit_nano", "evit_deit_nano", "dvt_deit_nano", "avit_deit_nano"]
CPU = Precision(torch.device("cpu"))


def batches_of(images: Tensor, sizes: list[int]) -> list[Tensor]:
    """The images in batches of these sizes, over and over."""
    batches, at = [], 0
    while at < len(images):
        size = sizes[len(batches) % len(sizes)]
        batches.append(images[at : at + size])
        at += size
    return batches


@pytest.mark.parametrize(
    "thresholds", [[0.5, 0.5], [0.9, 0.3], [0.0, 0.0], [1.1, 1.1], [1.1, 0.6], [0.2, 0.99]]
)
@pytest.mark.parametrize("sizes", [[8], [1], [3, 8, 1, 5]])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("max_wait", [1, 64])
def test_answers_are_those_of_early_exit_in_input_order(
    thresholds: list[float], sizes: list[int], pad: bool, max_wait: int
) -> None:
    images = scripted_images(101)
    expected = early_exit(Scripted(), images, thresholds)
    stream = ExitStream(Scripted(), CPU, thresholds, 8, pad, max_wait)
    batches = batches_of(images, sizes)
    answers = list(stream(batches))
    assert [len(exits) for _, exits in answers] == [len(batch) for batch in batches]
    assert torch.equal(torch.cat([logits for logits, _ in answers]), expected[0])
    assert torch.equal(torch.cat([exits for _, exits in answers]), expected[1])


class First(Scripted):
    """The first of its exits alone."""

    num_exits = 1


def test_what_no_batch_can_join_is_answered_at_once() -> None:
    """One image at a time, or one exit: nothing is queued, so no result waits for the next batch."""
    images, thresholds = scripted_images(40), [0.6, 0.6]
    for model, size, limits in ((Scripted(), 1, thresholds), (First(), 8, [])):
        expected = early_exit(model, images, limits)
        stream, batches = ExitStream(model, CPU, limits, size, pad=True), images.split(size)
        model.seen.clear()
        fed = []
        answers = list(stream(fed.append(batch) or batch for batch in batches))
        for column, wanted in zip(zip(*answers, strict=True), expected, strict=True):
            assert torch.equal(torch.cat(column), wanted)
        reached = expected[1].add(1).sum() if size == 1 else len(batches)
        assert len(model.seen) == reached  # stages that ran, none of them twice
        fed.clear()
        for number, _ in enumerate(stream(fed.append(batch) or batch for batch in batches), 1):
            assert len(fed) == number
        with pytest.raises(ValueError, match=f"in a stream of {size}"):
            list(stream([images[: size + 1]]))


@pytest.mark.parametrize("limit", [1, 5, 8, 20, 256])
def test_padding_on_cuda_leaves_eight_sizes(limit: int) -> None:
    sizes = [padded_size(n, limit, torch.device("cuda")) for n in range(1, limit + 1)]
    assert len(set(sizes)) <= 8 and max(sizes) == limit
    assert all(0 <= size - n < limit / 8 for n, size in enumerate(sizes, 1))
    assert [padded_size(n, limit, torch.device("cpu")) for n in range(limit + 1)] == list(range(limit + 1))


def test_padding_to_few_sizes_leaves_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    images, thresholds, model = scripted_images(50), [0.7, 0.7], Scripted()
    expected, steps = early_exit(model, images, thresholds), list(cascade(model, images, thresholds))
    assert set(model.seen) - {50}
    for module in (engine, inference.streaming):
        monkeypatch.setattr(
            module, "padded_size", lambda n, limit, device: min(limit, 16 * math.ceil(n / 16))
        )
    model.seen.clear()
    for ours, theirs in zip(early_exit(model, images, thresholds), expected, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(cascade(model, images, thresholds), steps, strict=True):
        assert torch.equal(ours.output.logits, theirs.output.logits) and torch.equal(ours.rows, theirs.rows)
        assert torch.equal(ours.output.info["first"], theirs.output.info["first"])
    answers = ExitStream(model, CPU, thresholds, 20)(images.split(20))
    for column, wanted in zip(zip(*answers, strict=True), expected, strict=True):
        assert torch.equal(torch.cat(column), wanted)
    assert {size for size in model.seen if size % 16} <= {50, 20}


def test_later_stages_run_on_full_batches_but_the_last() -> None:
    model, images, thresholds = Scripted(), scripted_images(200), [0.6, 0.6]
    _, exits = early_exit(model, images, thresholds)
    model.seen.clear()
    calls: list[tuple[int, int]] = []
    stage = model.stage
    model.stage = lambda k, x, prev: (calls.append((k, len(x))), stage(k, x, prev))[1]
    list(ExitStream(model, CPU, thresholds, 16)(batches_of(images, [16])))
    for k in (1, 2):
        sizes = [size for at, size in calls if at == k]
        reached = int((exits >= k).sum())
        assert sizes == [16] * (reached // 16) + ([reached % 16] if reached % 16 else [])


def test_padded_stages_see_one_shape() -> None:
    model = Scripted()
    list(ExitStream(model, CPU, [0.6, 0.6], 16, pad=True)(batches_of(scripted_images(75), [16])))
    assert set(model.seen) == {16}


def test_no_image_waits_longer_than_the_limit() -> None:
    images = scripted_images(400)
    first = confidence(Scripted()(images)[0].logits)
    images = torch.cat([images[first < 0.4][:1], images[first > 0.6][:159]])  # one image that nobody follows
    consumed = 0

    def feed():
        nonlocal consumed
        for batch in batches_of(images, [4]):
            consumed += 1
            yield batch

    stream = ExitStream(Scripted(), CPU, [0.5, 0.0], 4, max_wait=5)
    next(iter(stream(feed())))
    assert consumed == 6
    consumed = 0
    next(iter(ExitStream(Scripted(), CPU, [0.5, 0.0], 4, max_wait=1000)(feed())))
    assert consumed == 40


def test_a_batch_that_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="9 images in a stream of 8"):
        list(ExitStream(Scripted(), CPU, [0.5, 0.5], 8)([scripted_images(9)]))
    with pytest.raises(ValueError, match="1 thresholds given, the model has 2"):
        ExitStream(Scripted(), CPU, [0.5], 8)


@pytest.mark.parametrize("name", ["lf_deit_nano", "cf_deit_nano", "dvt_deit_nano", "avit_deit_nano"])
@pytest.mark.parametrize("sizes, pad", [([5], False), ([1, 5, 2], True)])
def test_models_answer_as_in_one_batch(name: str, sizes: list[int], pad: bool) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from the start, where all confidences are alike
            parameter += 0.05 * torch.randn_like(parameter)
    images = torch.randn(23, 3, model.img_size, model.img_size)
    with torch.inference_mode():
        outputs = model(images)
    thresholds = [confidence(out.logits).quantile(0.6).item() for out in outputs[:-1]]
    answers = list(ExitStream(model, CPU, thresholds, 5, pad)(batches_of(images, sizes)))
    logits, exits = (torch.cat(column) for column in zip(*answers, strict=True))
    expected, expected_exits = early_exit(model, images, thresholds)
    assert torch.equal(exits, expected_exits) and len(exits.unique()) == model.num_exits
    assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, mode", [(name, "default") for name in NAMES] + [(NAMES[0], "reduce-overhead")]
)
def test_compiled_stages_never_compile_again(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that split, stay whole or leave, ragged ones and single images after `compile_models` alone."""
    graphs: Counter[str] = Counter()
    real = torch.compile

    def counting(method: Callable, mode: str | None = None, **flags: Any) -> Callable:
        # The graphs are captured, as always, but run as they are: that compiles in no time.
        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
            graphs[method.__name__] += 1
            return graph

        return real(method, backend=backend, **flags)

    monkeypatch.setattr(torch, "compile", counting)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    images = torch.randn(21, 3, model.img_size, model.img_size)
    if model.image_gflops(0, model(images)[0].info) is not None:
        fit_knob(model, images, 0.66)
    batches = [images[:8], images[8:16], images[16:]]
    split = [confidence(out.logits).quantile(0.5).item() for out in model(images)[:-1]]
    expected = list(ExitStream(model, CPU, split, 8)(batches))
    assert compile_models({model: all_stages(model, CPU, 8)}, mode) is None
    assert all(name in vars(model) for name in model.compiled)
    compiled = Counter(graphs)
    assert compiled["stage"] == model.num_exits or compiled == {"project": 1, "finish": 1}
    for thresholds in (split, [math.inf] * len(split), [0.0] * len(split)):
        answers = list(ExitStream(model, CPU, thresholds, 8, pad=True)([*batches, images[:3]]))
        if thresholds is split:
            for (ours, exits), (theirs, wanted) in zip(answers, expected, strict=False):
                assert torch.equal(exits, wanted)
                assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert graphs == compiled
    uncompile([model])
    assert not {"stage", *model.compiled} & vars(model).keys()


def test_rows_of_any_number_share_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows that fall to one, or to none, meet the graphs of the first run."""
    graphs: list[int] = []
    real = torch.compile
    backend = lambda graph, inputs: graphs.append(1) or graph  # noqa: E731
    monkeypatch.setattr(
        torch, "compile", lambda method, mode=None, **flags: real(method, backend=backend, **flags)
    )
    torch.manual_seed(0)
    model = timm.create_model("avit_deit_nano", gate_center=1000.0).eval()
    image = torch.randn(1, 3, model.img_size, model.img_size)
    assert compile_models({model: all_stages(model, CPU, 2)}) is None
    compiled = len(graphs)
    with torch.inference_mode():
        x = model.embed(image)
        x[0, 1:, 0] = 1e4  # all but the class token halt after the first block
        x[0, 0, 0] = -1e4
        _, info = model.run(x)
        assert info["tokens"].tolist() == [[197, 1, 1, 1]]
        model(image[:0])
        model(torch.cat([image] * 3))
    assert len(graphs) == compiled
    uncompile([model])


@pytest.mark.parametrize("name", NAMES)
def test_stages_export_with_a_free_batch_size(name: str) -> None:
    drops = {"drop_loc": 0} if name.startswith("evit") else {}
    model = timm.create_model(name, num_classes=5, depth=1, **drops).eval()
    images, info = torch.randn(3, 3, model.img_size, model.img_size), {}
    batch = torch.export.Dim("batch", min=2)
    for k in range(model.num_exits):
        stage = StageRunner(model, k, list(info))
        inputs = images, *info.values()
        shapes = {"images": {0: batch}} | ({"info": tuple({0: batch} for _ in info)} if info else {})
        program = torch.export.export(stage, inputs, dynamic_shapes=shapes, strict=False)
        taken = [torch.cat([value, value[:2]]) for value in inputs]
        ours, theirs = program.module()(*taken), stage(*taken)
        kept = None if model.num_exits > 1 else 1  # what a later stage reads, or the logits
        for value, expected in zip(ours[:kept], theirs[:kept], strict=True):
            assert_close(value, expected, atol=1e-5, rtol=1e-5)
        info = {name: value.contiguous() for name, value in model.stage(k, images, info).info.items()}
