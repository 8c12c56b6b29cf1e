"""Exit-aware batching against early exit batch by batch, on scripted exits and on real models."""

from functools import partial

import pytest
import timm
import torch
from test_engine import Scripted, scripted_images
from torch import Tensor
from torch.testing import assert_close

from engine import Precision, early_exit
from inference.streaming import ExitStream, all_stages, compile_models, uncompile
from models.cost import fit_knob
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
    # The graphs are captured, as always, but run as they are: that compiles in no time.
    captured = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda method, mode=None, **flags: captured(method, **flags))
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    images = torch.randn(21, 3, model.img_size, model.img_size)
    if model.image_gflops(0, model(images)[0].info) is not None:
        fit_knob(model, images, 0.66)
    batches = [images[:8], images[8:16], images[16:]]
    thresholds = [confidence(out.logits).quantile(0.5).item() for out in model(images)[:-1]]
    expected = list(ExitStream(model, CPU, thresholds, 8)(batches))
    assert compile_models({model: all_stages(model, CPU, 8)}, mode) is None
    assert all(name in vars(model) for name in model.compiled)
    list(ExitStream(model, CPU, thresholds, 8, pad=True)(batches))  # a changing number of rows is met here
    with torch._dynamo.config.patch(error_on_recompile=True):
        answers = list(ExitStream(model, CPU, thresholds, 8, pad=True)([*batches, images[:3]]))
    for (ours, exits), (theirs, wanted) in zip(answers, expected, strict=False):
        assert torch.equal(exits, wanted)
        assert_close(ours, theirs, atol=1e-5, rtol=0)
    uncompile([model])
    assert not {"stage", *model.compiled} & vars(model).keys()
