"""GFLOPs against a closed form and against PyTorch's own counter."""

import math
import re

import pytest
import timm
import torch
from cases import ROOT, unset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import models  # noqa: F401  (registers the models)
import utils
from models import flags
from models.cost import exit_gflops, stage_gflops

LF = [
    dict(),
    dict(region_size=4),
    dict(location_stage_size=9),
    dict(location_stage_size=9, region_size=5),
    dict(location_stage_size=7, region_size=7, alpha=1.0),
]


def block_macs(n: int, d: int, ratio: float, norms: bool) -> float:
    """Linear layers 4nd^2 + 2rnd^2, attention 2n^2d; fvcore counts 5 per normalised element."""
    return (4 + 2 * ratio) * n * d * d + 2 * n * n * d + norms * 2 * 5 * n * d


def closed_form(model, norms: bool) -> list[float]:
    """Multiply-adds of LF-ViT's stages, with or without LayerNorm and the resize of the image."""
    g, d, k, heads = model.stage_size, model.embed_dim, model.refined, model.num_classes
    pixels = 3 * model.patch_size**2
    depth, ratio = len(model.blocks), model.blocks[0].mlp.fc1.out_features / d
    n0, n1 = g * g + 1, 1 + 4 * k + g * g - k
    rows = (depth - model.first_attention) * n0 * d  # one query per block of the class attention
    first = g * g * pixels * d + depth * block_macs(n0, d, ratio, norms) + rows + d * heads
    second = 4 * k * pixels * d + 2 * ratio * k * d * d + depth * block_macs(n1, d, ratio, norms) + d * heads
    if norms:
        first += 5 * n0 * d + 4 * 3 * (g * model.patch_size) ** 2  # final norm; bilinear resize
        second += 5 * d + 5 * k * d  # final norm of the class token; norm of the reused features
    return [first, second]


@pytest.mark.parametrize("kwargs", LF)
def test_stage_gflops_equal_the_closed_form(kwargs: dict) -> None:
    model = unset("lf_deit_small", **kwargs)
    assert stage_gflops(model) == pytest.approx([macs / 1e9 for macs in closed_form(model, True)], rel=1e-9)


@pytest.mark.parametrize("kwargs", LF[:3])
def test_matrix_products_equal_pytorchs_counter(kwargs: dict) -> None:
    """FlopCounterMode sees linear layers, convolutions, products and attention, at two per multiply-add."""
    model = unset("lf_deit_small", **kwargs).eval()
    image, info = torch.zeros(1, 3, model.img_size, model.img_size), {}
    for k, expected in enumerate(closed_form(model, False)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            info = model.stage(k, image, info).info
        assert counter.get_total_flops() == 2 * expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "kwargs, published",
    [
        (dict(), [1.101958, 3.810800]),
        (dict(region_size=4), [1.101958, 3.323049]),
        (dict(location_stage_size=9), [1.831337, 7.997272]),
        (dict(location_stage_size=9, region_size=5), [1.831337, 5.374657]),
    ],
)
def test_selecting_first_saves_what_the_original_embeds_and_reuses_in_vain(
    kwargs: dict, published: list
) -> None:
    """Against fvcore's count of the published code, which embeds and reuses all patches before it selects.

    It forms whole attention maps, so the class attention costs it nothing, and gets the small image for free.
    """
    model = unset("lf_deit_small", **kwargs)
    g, d, k = model.stage_size, model.embed_dim, model.refined
    n1 = 1 + 4 * k + g * g - k
    extra = 4 * 3 * (g * 16) ** 2 + 9 * (g * g + 1) * d
    saved = (4 * g * g - 4 * k) * 768 * d  # patches embedded in vain
    saved += (g * g - k) * (8 * d * d + 5 * d)  # features reused in vain
    saved += 5 * (n1 - 1) * d  # only the class token needs the last norm
    saved += 4 * g * g * d  # nearest upsampling of the features
    first, both = exit_gflops(model)
    assert first == pytest.approx(published[0] + extra / 1e9, abs=2e-6)
    assert both == pytest.approx(published[1] + (extra - saved) / 1e9, abs=2e-6)
    assert both < published[1]


def test_plain_vit_is_not_missing_its_attention() -> None:
    """DeiT-S is 4.61 GFLOPs; without a handle for the fused kernel fvcore reads 4.25."""
    model = models.AdaptiveViT()
    macs = 196 * 768 * 384 + 12 * block_macs(197, 384, 4, True) + 5 * 384 + 384 * 1000
    assert exit_gflops(model) == pytest.approx([macs / 1e9], rel=1e-9)
    assert math.isclose(macs / 1e9, 4.61, abs_tol=0.01)


def test_counting_leaves_the_model_as_it_was() -> None:
    model = timm.create_model("lf_deit_nano").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stage_gflops(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class NoFloat64(TorchDispatchMode):
    """Fails where an operator makes float64, as Apple's GPUs do."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            assert not (isinstance(value, torch.Tensor) and value.dtype == torch.float64), function
        return result


def test_costs_of_images_need_no_float64_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("avit_deit_nano").eval()
    with torch.inference_mode():
        images = torch.rand(3, 3, 56, 56)
        exact = model.image_gflops(0, model(images)[0].info)
        monkeypatch.setattr(utils, "NO_FLOAT64", {"cpu"})
        with NoFloat64():
            cost = model.image_gflops(0, model(images)[0].info)
    assert exact.dtype == torch.float64 and cost.dtype == torch.float32
    torch.testing.assert_close(cost.double(), exact, rtol=1e-6, atol=0)


def counted_here(page: str) -> list[tuple[str, str]]:
    """Model with flags, and count, of all rows of a page's tables that have a column "counted here"."""
    found, column = [], None
    for line in (ROOT / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            column = None
        elif titles := [at for at, cell in enumerate(cells) if "counted here" in cell]:
            (column,) = titles
        elif column is not None and "`" in cells[0]:
            found.append((re.search("`(.+?)`", cells[0])[1], cells[column]))
    return found


FIGURES = counted_here("README.md") + counted_here("docs/results.md")


def test_the_pages_have_figures_of_every_method_of_full_size() -> None:
    assert [len(counted_here(page)) for page in ("README.md", "docs/results.md")] == [12, 21]
    assert {text.split("_")[0] for text, _ in FIGURES} == {"lf", "cf", "evit", "avit", "dvt"}


@pytest.mark.slow
@pytest.mark.parametrize(("text", "figures"), dict.fromkeys(FIGURES))
def test_figures_of_the_pages_are_what_the_code_counts(text: str, figures: str) -> None:
    parser = utils.Parser()
    flags.add_model_flags(parser)
    args = parser.parse_args(["--model", *text.split()])
    model = unset(args.model, **flags.constructor_kwargs(vars(args)))
    counted = " / ".join(f"{gflops:.3f}" for gflops in exit_gflops(model))
    assert figures.removesuffix(" (full depth)") == counted
