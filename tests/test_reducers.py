"""Tests of reducers: models whose later stages drop or merge tokens as another method does."""

from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from engine import early_exit
from models.cost import stage_gflops
from models.dvt import at_places
from models.exits import confidence
from models.registry import reducers

TWO_STAGE = ("lf_deit_nano", "cf_deit_nano")
HOSTS = (*TWO_STAGE, "dvt_deit_nano", "deit_nano")
DROP, FUSE = dict(reducer="evit", keep_rate=0.6), dict(reducer="evit", keep_rate=0.6, fuse_token=True)
MERGE = dict(reducer="tome", r=9)
IDLE = (dict(reducer="evit", keep_rate=1.0), dict(reducer="tome", r=0))  # they take no token away


def pair(host: str, **kwargs: object) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A plain model, the same weights with a reducer, and images."""
    torch.manual_seed(0)
    plain = timm.create_model(host).eval()
    for name, parameter in plain.named_parameters():
        if parameter.ndim > 1 and "pos_embed" not in name:
            nn.init.normal_(parameter, std=0.15)
    reduced = timm.create_model(host, **kwargs).eval()
    reduced.load_state_dict(plain.state_dict())  # the weights are those of the plain model
    return plain, reduced, torch.randn(6, 3, 56, 56)


@cache
def plain_gflops(host: str) -> list[float]:
    return stage_gflops(timm.create_model(host))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("kwargs", IDLE, ids=lambda kwargs: kwargs["reducer"])
def test_a_reducer_that_takes_nothing_changes_nothing(host: str, kwargs: dict) -> None:
    plain, reduced, images = pair(host, **kwargs)
    with torch.no_grad():
        for ours, theirs in zip(reduced(images), plain(images), strict=True):
            assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("kwargs", [DROP, FUSE, MERGE], ids=["drop", "fuse", "merge"])
def test_the_last_stage_costs_less_and_the_others_stay(host: str, kwargs: dict) -> None:
    plain, reduced, images = pair(host, **kwargs)
    with torch.no_grad():
        ours, theirs = reduced(images), plain(images)
    costs, before = stage_gflops(reduced), plain_gflops(host)
    assert costs[:-1] == before[:-1] and costs[-1] < before[-1]
    for k in range(len(ours) - 1):
        assert torch.equal(ours[k].logits, theirs[k].logits)
    assert not torch.allclose(ours[-1].logits, theirs[-1].logits, atol=1e-4)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("kwargs", [DROP, FUSE, MERGE], ids=["drop", "fuse", "merge"])
def test_early_exit_is_the_full_forward_at_the_exit_taken(host: str, kwargs: dict) -> None:
    _, reduced, images = pair(host, **kwargs)
    with torch.no_grad():
        outputs = reduced(images)
        thresholds = [confidence(out.logits).median().item() for out in outputs[:-1]]
        logits, exits = early_exit(reduced, images, thresholds)
        for row, exit_ in enumerate(exits.tolist()):
            assert_close(logits[row], outputs[exit_].logits[row], atol=1e-5, rtol=1e-5)
        alone = reduced(images[1:2])[-1].logits
        assert_close(alone, outputs[-1].logits[1:2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("kwargs", [DROP, FUSE, MERGE], ids=["drop", "fuse", "merge"])
def test_training_reaches_every_weight(host: str, kwargs: dict) -> None:
    _, reduced, images = pair(host, **kwargs)
    reduced.train()
    terms = reduced.loss(reduced(images), torch.arange(6), F.cross_entropy)
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in reduced.parameters() if p.requires_grad)


@pytest.mark.parametrize("host", TWO_STAGE)
def test_pictures_tell_patches_of_the_full_grid(host: str) -> None:
    _, reduced, images = pair(host, **DROP)
    with torch.no_grad():
        info = reduced(images)[1].info
    picture = reduced.picture(info)
    slots = info["kept_1"]  # the first drop: slots of all refined patches, then of the coarse ones
    fine = info["kept"].shape[1]
    for image in range(len(images)):
        expected = set()
        for slot in slots[image].tolist():
            if slot < fine:
                expected.add(info["kept"][image, slot].item())
            else:
                row, column = divmod(info["rest"][image, slot - fine].item(), 7)
                expected |= {14 * (2 * row + i) + 2 * column + j for i in (0, 1) for j in (0, 1)}
        assert set(picture.kept[0][image].tolist()) == expected
    _, merged, _ = pair(host, **MERGE)
    with torch.no_grad():
        info = merged(images)[1].info
    groups = merged.picture(info).groups
    assert groups.shape == (6, 196)
    for image in range(len(images)):
        for slot, patch in enumerate(info["kept"][image].tolist()):
            assert groups[image, patch] == info["token_group"][image, 1 + slot]
        for slot, patch in enumerate(info["rest"][image].tolist(), fine):
            corner = 28 * (patch // 7) + 2 * (patch % 7)
            children = groups[image, [corner, corner + 1, corner + 14, corner + 15]]
            assert children.tolist() == [info["token_group"][image, 1 + slot].item()] * 4


def test_what_is_reused_follows_its_token() -> None:
    """The last exit reads logits and features of the tokens that are left, and none for a fused one."""
    x = torch.arange(24.0).view(1, 2, 3, 4)
    places = torch.tensor([[0, 2, -1]])
    assert at_places(x, places, dim=-2)[0, 1].tolist() == [[12, 13, 14, 15], [20, 21, 22, 23], [0, 0, 0, 0]]
    assert at_places(x, places, dim=-1)[0, 0].tolist() == [[0, 2, 0], [4, 6, 0], [8, 10, 0]]


@pytest.mark.parametrize("kwargs", [DROP, FUSE, MERGE], ids=["drop", "fuse", "merge"])
def test_the_cascade_is_a_plain_stack_where_nothing_is_reused(kwargs: dict) -> None:
    """Without reuse the last exit is a model of its own, whose reducer sees the same tokens."""
    switches = dict(feature_reuse=False, relation_reuse=False)
    torch.manual_seed(0)
    reduced = timm.create_model("dvt_deit_nano", **switches, **kwargs).eval()
    single = timm.create_model("deit_nano", **kwargs).eval()
    prefix = "normal_token."
    state = {k.removeprefix(prefix): v for k, v in reduced.state_dict().items() if k.startswith(prefix)}
    single.load_state_dict(state)
    images = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        assert_close(reduced(images)[2].logits, single(images)[0].logits, atol=1e-5, rtol=1e-5)


def test_a_knob_moves_the_reducer() -> None:
    _, reduced, _ = pair("lf_deit_nano", **DROP)
    assert set(reduced.knobs) == {"keep_rate"}
    dear = stage_gflops(reduced)[1]
    reduced.keep_rate = 0.3
    assert stage_gflops(reduced)[1] < dear


@pytest.mark.parametrize(
    "host, kwargs, message",
    [
        ("lf_deit_nano", dict(reducer="none"), "take one of evit, tome"),
        ("evit_deit_nano", dict(reducer="tome"), "takes no reducer"),
        ("avit_deit_nano", dict(reducer="tome"), "takes no reducer"),
        ("cf_lvvit_nano", dict(reducer="evit"), "takes no reducer"),
        ("lf_deit_nano", dict(reducer="evit", distilled=True), "no distillation token"),
        ("lf_deit_nano", dict(keep_rate=0.5), "keep_rate"),
    ],
)
def test_what_cannot_be_composed_says_so(host: str, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model(host, **kwargs)


def test_the_methods_that_reduce_are_offered() -> None:
    assert sorted(reducers) == ["evit", "tome"]
