"""Tests of utils.py: files stay whole, foreign checkpoints are read, errors name what is wrong."""

import argparse
import datetime
import errno
import json
import logging
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from cases import ROOT, close_logs, run
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import models  # noqa: F401  (registers the models)
import utils
from checkpointing.format import (
    NumpyType,
    Results,
    add_to_checkpoint,
    load_checkpoint,
    load_json,
    read_file,
    restore_rng,
    rng_state,
    save_checkpoint,
    save_json,
)
from checkpointing.schema import fits
from models import flags
from models.weights import create_model, initialise_from, load_weights, model_from_checkpoint

STATE = {"head.weight": torch.arange(6.0).reshape(2, 3), "head.bias": torch.tensor([1.0, -2.0])}
TINY = dict(embed_dim=16, depth=2, num_heads=2, num_classes=4, location_stage_size=3, region_size=2)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Writing


def test_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        path.write_text("ha")
        raise OSError("disk full")

    (tmp_path / "log.json").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        utils.write_atomically(tmp_path / "log.json", half)
    assert (tmp_path / "log.json").read_text() == "old"
    assert names_in(tmp_path) == ["log.json"]


def test_unsaveable_checkpoint_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    save_checkpoint({"model": STATE}, path)
    before = path.read_bytes()
    with pytest.raises((AttributeError, TypeError, RuntimeError)):  # not even pickle takes a generator
        save_checkpoint({"model": STATE, "bad": (value for value in ())}, path)
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["checkpoint.pth"]


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save_json({"a": 1}, path)

    def write(temporary: Path) -> None:
        assert temporary.parent == path.parent  # a rename is atomic inside a file system only
        temporary.write_text("{}")
        assert load_json(path) == {"a": 1}

    utils.write_atomically(path, write)
    assert load_json(path) == {}
    assert names_in(tmp_path) == ["results.json"]


def test_keys_are_added_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    args = argparse.Namespace(lr=0.1)
    save_checkpoint({"model": {"module.w": STATE["head.bias"]}, "args": args, "epoch": 7}, path)
    add_to_checkpoint(path, {"flops": [1.0, 2.0]})
    found = read_file(path)
    assert found.keys() == {"model", "args", "epoch", "flops"}
    assert found["args"] == args and found["epoch"] == 7 and found["flops"] == [1.0, 2.0]
    assert same_state(found["model"], {"module.w": STATE["head.bias"]})


def test_files_of_another_layout_take_no_results(tmp_path: Path) -> None:
    path = tmp_path / "bare.pth"
    torch.save(STATE, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="--results"):
        add_to_checkpoint(path, {"flops": [1.0]})
    assert path.read_bytes() == before


# Reading


@pytest.mark.parametrize(
    "content",
    [
        {"model": STATE},
        {"state_dict": STATE, "arch": "vit"},
        {"model_state_dict": STATE},
        STATE,
        {"model": {f"module.{name}": value for name, value in STATE.items()}},
        {"model": {f"_orig_mod.{name}": value for name, value in STATE.items()}},
        {"state_dict": {f"module._orig_mod.{name}": value for name, value in STATE.items()}},
        {"model": STATE, "args": argparse.Namespace(lr=0.1, data_path="x"), "epoch": 3},
        {"model": STATE, "flop": [1.0, 2.0]},
    ],
    ids="model state_dict model_state_dict bare module compiled both namespace flop".split(),
)
def test_layouts_of_checkpoints(content: dict, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "checkpoint.pth")
    found = load_checkpoint(tmp_path / "checkpoint.pth")
    assert same_state(found["model"], STATE)
    for key in ("args", "epoch", "flop"):
        assert found.get(key) == content.get(key)


def test_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    assert same_state(load_checkpoint(tmp_path / "model.safetensors")["model"], STATE)


class Trap:
    """Pickles as a call that makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"model": STATE, "args": Trap(tmp_path / "made")}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="trap.pth is not a readable checkpoint"):
        load_checkpoint(tmp_path / "trap.pth")
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "trap.pth", weights_only=False)
    assert (tmp_path / "made").exists()  # the trap works where it is allowed to


@pytest.mark.parametrize("legacy", [False, True])
def test_numbers_of_numpy_and_paths_beside_the_weights_are_read(legacy: bool, tmp_path: Path) -> None:
    beside = {"f": np.float64(1.5), "i": np.int32(-3), "b": np.bool_(True), "s": np.str_("é"), "p": tmp_path}
    content = {
        "model": STATE,
        "type": np.dtype("f4"),
        **beside,
        "args": argparse.Namespace(lr=np.float32(0.5)),
    }
    file = tmp_path / "theirs.pth"
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    read = load_checkpoint(file)
    assert [read[key] for key in "fibs"] == [1.5, -3, True, "é"] and read["args"].lr == 0.5
    assert {type(read[key]) for key in "fibs"} == {float, int, bool, str}
    assert str(read["p"]) == str(tmp_path)
    add_to_checkpoint(file, {"flops": [1.0]})  # what was read can be written again
    assert load_checkpoint(file).keys() == content.keys() | {"flops"}


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.zeros(3), "numpy._core.multiarray._reconstruct"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (datetime.timedelta(3), "datetime.timedelta"),
        (np.datetime64("2020-01-01"), "numpy type M8"),
    ],
)
def test_a_blocked_type_is_named_in_one_plain_line(value: object, name: str, tmp_path: Path) -> None:
    torch.save({"model": STATE, "x": value}, tmp_path / "theirs.pth")
    with pytest.raises(utils.InputError, match=name.replace(".", r"\.")) as caught:
        load_checkpoint(tmp_path / "theirs.pth")
    line = str(caught.value)
    assert "\x1b" not in line and "\n" not in line and "weights_only" not in line and len(line) < 300


@pytest.mark.parametrize("state", [("x", "O", None), (3, "O,f8", None), (3, "<f8,O", None)])
def test_numpy_types_in_a_file_are_numbers_and_texts_only(state: tuple) -> None:
    kind = NumpyType("f8", False, True)
    with pytest.raises(TypeError, match="no number or text"):
        kind.__setstate__(state)
    with pytest.raises(TypeError):
        NumpyType("O8")


def test_whole_models_are_refused(tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "pickled.pth")
    with pytest.raises(ValueError, match="pickled.pth"):
        load_checkpoint(tmp_path / "pickled.pth")


@pytest.mark.parametrize("name", ["checkpoint.pth", "model.safetensors"])
@pytest.mark.parametrize("size", [0, 1, 100, -20])
def test_truncated_file(name: str, size: int, tmp_path: Path) -> None:
    path = tmp_path / name
    torch.save({"model": STATE}, path) if path.suffix == ".pth" else save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=name) as caught:
        load_checkpoint(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, {"model": 3}, torch.zeros(2)])
def test_file_without_weights(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth"):
        load_checkpoint(tmp_path / "other.pth")


def test_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "no.pth", tmp_path / "no.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            load_checkpoint(path)


def test_json_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="results.json"):
        load_json(tmp_path / "results.json")


# Results


def test_results_read_every_spelling() -> None:
    budgeted = [torch.tensor([1.0, 2.0]), np.array([50.0, 60.0])]
    found = Results.of({"flop": torch.tensor([1.5, 3.5]), "budgeted_batch_classification": budgeted})
    assert found.flops == [1.5, 3.5]
    assert found.budgeted_batch_classification == [[1.0, 2.0], [50.0, 60.0]]
    assert found.anytime_classification is None and found.dynamic_threshold is None
    assert found.known().keys() == {"flops", "budgeted_batch_classification"}
    assert Results.of({"flops": (1.0, 2.0), "flop": [8.0, 9.0]}).flops == [1.0, 2.0]


def test_results_survive_a_checkpoint_and_json(tmp_path: Path) -> None:
    results = Results([1.0, 2.0], [50.0, 60.0], [[1.0, 1.5], [50.0, 55.0]], [[0.3], [0.7]])
    save_checkpoint({"model": STATE} | results.known(), tmp_path / "checkpoint.pth")
    save_json(results.known(), tmp_path / "results.json")
    assert Results.of(load_checkpoint(tmp_path / "checkpoint.pth")) == results
    assert Results.of(load_json(tmp_path / "results.json")) == results
    assert json.loads((tmp_path / "results.json").read_text()).keys() == {
        "flops",
        "anytime_classification",
        "budgeted_batch_classification",
        "dynamic_threshold",
    }


# Weights


def test_loading_weights_is_strict() -> None:
    model = timm.create_model("lf_deit_nano", **TINY)
    state = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}
    load_weights(model, state, "file.pth")
    assert same_state(model.state_dict(), state)
    cases = {
        r"head.weight is \(7, 16\) there and \(4, 16\) here": state | {"head.weight": torch.zeros(7, 16)},
        r"lacks 1 tensors \(cls_token": {name: state[name] for name in state if name != "cls_token"},
        r"1 unknown ones \(blocks.2.norm1.bias": state | {"blocks.2.norm1.bias": torch.zeros(16)},
    }
    for text, bad in cases.items():
        with pytest.raises(ValueError, match=f"file.pth .*{text}"):
            load_weights(model, {name: torch.zeros_like(value) for name, value in bad.items()}, "file.pth")
        assert same_state(model.state_dict(), state)  # nothing of it was loaded


def test_model_is_rebuilt_from_its_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("lf_deit_nano", TINY)
    average = {name: value + 1 for name, value in model.state_dict().items()}
    saved = {"model": model.state_dict(), "model_ema": average, "model_name": "lf_deit_nano"}
    save_checkpoint(saved | {"model_kwargs": TINY}, tmp_path / "checkpoint.pth")
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pth")
    again, name, kwargs = model_from_checkpoint(checkpoint, "file.pth", None, {})
    assert (name, kwargs) == ("lf_deit_nano", TINY)
    assert same_state(again.state_dict(), model.state_dict())
    averaged, *_ = model_from_checkpoint(checkpoint, "file.pth", None, {}, use_ema=True)
    assert same_state(averaged.state_dict(), average)
    other, _, kwargs = model_from_checkpoint(checkpoint, "file.pth", None, {"region_size": 3})
    assert other.region_size == kwargs["region_size"] == 3  # the command line wins
    with pytest.raises(ValueError, match="file.pth is a checkpoint of lf_deit_nano, not of deit_nano"):
        model_from_checkpoint(checkpoint, "file.pth", "deit_nano", {})


def test_foreign_weights_need_a_name_but_no_number_of_classes() -> None:
    state = create_model("deit_nano", {"num_classes": 7}).state_dict()
    model, *_ = model_from_checkpoint({"model": state}, "file.pth", "deit_nano", {})
    assert model.num_classes == 7 and same_state(model.state_dict(), state)
    with pytest.raises(ValueError, match="--model"):
        model_from_checkpoint({"model": state}, "file.pth", None, {})
    with pytest.raises(ValueError, match="--use-ema"):
        model_from_checkpoint({"model": state}, "file.pth", "deit_nano", {}, use_ema=True)


@pytest.mark.parametrize(
    ("name", "kwargs", "text"),
    [
        (None, {}, "--model"),
        ("lf_deit_nanoo", {}, "unknown model 'lf_deit_nanoo'; there are .*lf_deit_nano"),
        ("resnet10t", {}, "plain timm model"),
        ("lf_deit_nano", {"colour": 3}, "colour"),
        ("lf_deit_nano", {"region_size": 9}, "region_size is 9"),
        ("lf_deit_nano", {"alpha": 0}, "alpha is 0"),
        ("lf_deit_nano", {"num_heads": 5}, "num_heads 5"),
        ("lf_deit_nano", {"location_stage_size": 0}, "stage size is 0"),
        ("lf_deit_nano", {"pretrained": True}, "no weights are hosted"),
    ],
)
def test_models_that_cannot_be_made(name: str | None, kwargs: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        create_model(name, kwargs)


# Starting from the weights of a plain model


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger=utils.log.name)
    return caplog


def plain_state(grid: int) -> dict[str, Tensor]:
    """Weights of a plain DeiT over a grid of the given side."""
    torch.manual_seed(1)
    deit = VisionTransformer(4 * grid, 4, embed_dim=16, depth=2, num_heads=2, num_classes=10)
    return {name: torch.randn_like(value) for name, value in deit.state_dict().items()}


@pytest.mark.parametrize("grid", [3, 5, 6])
def test_finetuning_starts_from_a_plain_model(
    grid: int, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    state = plain_state(grid)
    torch.save({"model": state}, tmp_path / "deit.pth")
    model = timm.create_model("lf_deit_nano", **TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    initialise_from(model, load_checkpoint(tmp_path / "deit.pth")["model"], str(tmp_path / "deit.pth"))
    after = model.state_dict()
    for stage, side in enumerate((3, 6)):
        table = resample_abs_pos_embed(state["pos_embed"], [side, side], antialias=False)
        assert torch.equal(after[f"pos_embed_list.{stage}"], table)
    kept = [name for name in after if name.startswith(("head.", "reuse_block."))]
    taken = [name for name in after if name in state and name not in kept]
    assert len(kept) == 8 and len(kept) + len(taken) + 2 == len(after)
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert all(torch.equal(after[name], state[name]) for name in taken)
    named = [set(text.split(": ")[1].split(", ")) for text in logged.messages if ": " in text]
    assert set(kept) in named and {"head.weight", "head.bias"} in named  # not in the file; not used


def test_distillation_token_has_no_place(tmp_path: Path) -> None:
    state = plain_state(3)
    table = state["pos_embed"]
    state["dist_token"] = torch.randn(1, 1, 16)
    state["pos_embed"] = torch.cat([table[:, :1], torch.randn(1, 1, 16), table[:, 1:]], dim=1)
    torch.save(state, tmp_path / "distilled.pth")
    model = timm.create_model("lf_deit_nano", **TINY)
    initialise_from(
        model, load_checkpoint(tmp_path / "distilled.pth")["model"], str(tmp_path / "distilled.pth")
    )
    assert torch.equal(model.pos_embed_list[0], table)


def test_finetuning_from_another_grid_resamples_both_positions() -> None:
    small = timm.create_model("lf_deit_nano", **TINY)
    large = timm.create_model("lf_deit_nano", **(TINY | {"location_stage_size": 9, "region_size": 5}))
    initialise_from(large, small.state_dict(), "small.pth")
    for own, other, side in zip(large.pos_embed_list, small.pos_embed_list, (9, 18), strict=True):
        torch.testing.assert_close(own, resample_abs_pos_embed(other, [side, side], antialias=False))


def test_finetuning_needs_a_tensor_that_fits() -> None:
    with pytest.raises(ValueError, match="other.pth"):
        initialise_from(timm.create_model("lf_deit_nano", **TINY), STATE, "other.pth")


# Random numbers


def test_generators_continue_from_a_file(tmp_path: Path) -> None:
    def numbers() -> list[float]:
        own = [torch.randn(()).item(), np.random.standard_normal(), random.gauss(0, 1), random.random()]
        return own + torch.randperm(9).tolist() + np.random.permutation(9).tolist()

    utils.start("cpu", seed=3)
    numbers()  # an odd number of normal draws: half a pair is kept in NumPy's and Python's state
    save_checkpoint({"model": STATE, "rng": [rng_state()]}, tmp_path / "checkpoint.pth")
    expected = numbers()
    assert numbers() != expected
    restore_rng(load_checkpoint(tmp_path / "checkpoint.pth")["rng"][0])
    assert numbers() == expected
    utils.start("cpu", seed=3)
    numbers()
    assert numbers() == expected


# Command line


def test_model_kwargs_take_json_and_words() -> None:
    parser = argparse.ArgumentParser()
    flags.add_model_flags(parser)
    argv = "--alpha 0.5 --model-kwargs depth=3 init=deit mlp_ratio=2.5 qkv_bias=false".split()
    found = flags.constructor_kwargs(vars(parser.parse_args(argv)))
    assert found == {"alpha": 0.5, "depth": 3, "init": "deit", "mlp_ratio": 2.5, "qkv_bias": False}
    with pytest.raises(ValueError, match="depth"):
        flags.constructor_kwargs(vars(parser.parse_args(["--model-kwargs", "depth"])))
    assert flags.key_values("-k", ["a=False", "b=true", "c=None"]) == {"a": False, "b": True, "c": None}
    with pytest.raises(utils.InputError, match="depth twice"):
        flags.key_values("-k", ["depth=3", "depth=4"])


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (utils.Number(float), ["-1", "1e3", "0"], ["nan", "inf", "-inf", "1e400", "x", "", "1 2"]),
        (utils.SHARE, ["0", "1", "0.5"], ["-0.1", "1.1", "nan", "inf"]),
        (utils.NON_NEGATIVE, ["0", "7.5"], ["-1e-9", "inf"]),
        (utils.POSITIVE_INT, ["1", "20"], ["0", "-1", "1.5", "1e3", "nan"]),
    ],
)
def test_numbers_of_the_command_line(kind: utils.Number, good: list[str], bad: list[str]) -> None:
    for text in good:
        assert kind(text) == kind.kind(text)
    parser = utils.Parser()
    parser.add_argument("--flag", type=kind)
    for text in bad:
        with pytest.raises(ValueError, match=f"argument --flag: '{text}' is not {kind}; --help"):
            parser.parse_args([f"--flag={text}"])


@pytest.mark.parametrize("name", ["epoch", "fraction"])
@pytest.mark.parametrize("text", ["nan", "inf", "x"])
def test_plain_numbers_are_finite_too(name: str, text: str) -> None:
    parser = utils.Parser()
    parser.add_argument("--epoch", type=int)
    parser.add_argument_group("others").add_argument("--fraction", type=float, nargs=2)
    with pytest.raises(ValueError, match=f"argument --{name}: '{text}' is not a"):
        parser.parse_args([f"--{name}", text, "1"])


# What a file may hold


@pytest.mark.parametrize(
    ("value", "kind", "fitting"),
    [
        (3, float, True),
        (True, float, False),
        (float("nan"), float, False),
        (3.0, int, False),
        ([0.5, 1], list[float], True),
        ((0.5, 1), list[float], True),
        ([], list[float], False),
        ([0.5, "x"], list[float], False),
        ([[1.0], [2.0]], list[list[float]], True),
        ([[1.0], [2.0, 3.0]], list[list[float]], False),
        ([1.0, 2.0], tuple[float, float, float], False),
        ({"a": torch.zeros(2)}, dict[str, Tensor], True),
        ({"a": 1}, dict[str, Tensor], False),
        ({1: torch.zeros(2)}, dict[str, Tensor], False),
        (-2, utils.Number(int, -1), False),
    ],
)
def test_kinds_of_values(value: object, kind: object, fitting: bool) -> None:
    assert fits(value, kind) == fitting


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (utils.InputError("a\n b"), 2, "tool.py: error: a b"),
        (FileNotFoundError("no x"), 2, "tool.py: error: no x"),
        (PermissionError(errno.EACCES, "denied", "x"), 2, "tool.py: error: [Errno 13] denied: 'x'"),
        (OSError(errno.ENOSPC, "full", "x"), 1, "tool.py: failed: [Errno 28] full: 'x'"),
        (OSError(errno.EIO, "broken"), 1, "tool.py: failed: [Errno 5] broken"),
        (BrokenPipeError(errno.EPIPE, "gone"), 1, "tool.py: failed: [Errno 32] gone"),  # no reader of ours
        (
            OSError("Original Traceback\nOSError: [Errno 28] full: 'x'"),
            1,
            "tool.py: failed: [Errno 28] full: 'x'",
        ),
        (utils.InputError("x.png: [Errno 5] broken"), 1, "tool.py: failed: x.png: [Errno 5] broken"),
        (utils.MainError("the loss is nan"), 1, "tool.py: failed: the loss is nan"),
        (KeyboardInterrupt(), 130, "tool.py: interrupted"),
    ],
)
def test_errors_become_one_line_and_an_exit_code(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main() -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["/path/tool.py"])
    with pytest.raises(SystemExit) as caught:
        utils.run_command(main)
    assert caught.value.code == code
    assert capsys.readouterr().err.splitlines() == [line]


@pytest.mark.parametrize("kind", [ValueError, TypeError, KeyError, RuntimeError, AssertionError, MemoryError])
def test_own_mistakes_keep_their_traceback(kind: type[Exception]) -> None:
    def main() -> None:
        raise kind("bug")

    with pytest.raises(kind):
        utils.run_command(main)


def test_libraries_refuse_values_in_one_line() -> None:
    for error in (KeyError("x"), AssertionError(), ValueError("a\nb"), utils.InputError("mine")):
        with pytest.raises(utils.InputError) as caught, utils.values_given("--flag 3"):
            raise error
        assert (
            str(caught.value)
            == {
                KeyError: "--flag 3: no 'x'",
                AssertionError: "--flag 3: AssertionError",
                ValueError: "--flag 3: a b",
                utils.InputError: "mine",
            }[type(error)]
        )
    with pytest.raises(ZeroDivisionError), utils.values_given("--flag 3"):
        raise ZeroDivisionError


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_interruptions_are_caught_unless_they_are_ignored(handler: object) -> None:
    seen = []
    before = signal.signal(signal.SIGINT, handler)
    try:
        utils.run_command(lambda: seen.append(signal.getsignal(signal.SIGINT)))
        assert seen == [signal.getsignal(signal.SIGINT)] == [handler]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("device", "text"),
    [
        ("mps", "no MPS device is visible; use --device cpu"),
        ("xpu", "no XPU device is visible; use --device cpu"),
        ("cpu:1", "there are 1"),
        ("meta", "take cpu"),
        ("hpu", "take cpu"),
        ("graphics", "Expected one of cpu"),
    ],
)
@pytest.mark.skipif(torch.mps.device_count() + torch.xpu.device_count() > 0, reason="there is such a device")
def test_a_device_that_is_not_there_is_refused(device: str, text: str) -> None:
    with pytest.raises(utils.InputError, match=rf"--device {device}: .*{text}"):
        utils.start(device)


TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"


def test_a_run_without_cuda_says_why_or_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init() -> None:
        raise RuntimeError(TOO_OLD)

    for name, value in dict(init=init, is_available=lambda: False, device_count=lambda: 0).items():
        monkeypatch.setattr(torch.cuda, name, value)
    reason = TOO_OLD.split(". ")[0]
    with pytest.raises(utils.InputError, match=re.escape(f"no CUDA device is visible ({reason}); use")):
        utils.start("cuda")
    for device in (None, "cpu", "cuda"):
        with pytest.raises(utils.InputError, match=re.escape(f"--require-cuda: {reason}")):
            utils.start(device, require_cuda=True)
    for given, ending in ((None, f"; no CUDA: {reason}"), ("cpu", "")):
        utils.start_logging(context := utils.start(given))
        utils.log_device(context, given)
        assert not capsys.readouterr().err  # bad input would now be one line
        for _ in range(2):
            utils.log.info("next")
        lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
        assert lines == [f"device: cpu, {utils.cpu_name()}{ending}", "next", "next"]
        close_logs()


def test_where_there_is_cuda_it_can_be_required_and_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert utils.start(None, require_cuda=True).device == torch.device("cuda")
    with pytest.raises(utils.InputError, match="--require-cuda: --device is cpu"):
        utils.start("cpu", require_cuda=True)


@pytest.mark.parametrize("name", ["main_deit", "dynamic_inference", "visualize", "benchmark"])
def test_every_command_that_takes_a_device_can_require_cuda(name: str, monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    asked = []
    monkeypatch.setattr(utils, "start", lambda *given, **named: asked.append((*given, *named.values())))
    argv = dict(
        main_deit="--model deit_nano --data-path x",
        dynamic_inference="--checkpoint_path x",
        visualize="--resume x --images x",
        benchmark="",
    )
    monkeypatch.setattr(sys, "argv", [name, "--require-cuda", *argv[name].split()])
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute"):
        __import__(name).main()
    assert asked[0][-1] is True


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    utils.check_device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(utils.InputError, match="there are 2"):
        utils.check_device("cuda")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_does_not_take_is_refused(seed: int) -> None:
    with pytest.raises(utils.InputError, match=f"--seed is {seed}"):
        utils.start("cpu", seed)


# Commands in processes of their own

INTERRUPTED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
"""
COMMANDS = ["main_deit.py", "dynamic_inference.py", "visualize.py"]
SCRIPTS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "scripts").glob("[a-z]*.py"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COMMANDS, *SCRIPTS])
def test_ctrl_c_during_the_imports_is_one_line(name: str, tmp_path: Path) -> None:
    """The first import that takes long is torch's, or numpy's; sitecustomize is imported before any other."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    at = "numpy" if name in ("scripts/make_digits.py", "scripts/make_garments.py") else "torch"
    ended = run(name, "--help", PYTHONPATH=str(tmp_path), INTERRUPT_AT=at)
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == f"{Path(name).name}: interrupted\n"


@pytest.mark.slow
@pytest.mark.parametrize("at", ["argparse", "timm.data", "models", "inference.pictures"])
def test_ctrl_c_at_any_import_of_a_command_is_one_line(at: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    ended = run("main_deit.py", "--help", PYTHONPATH=str(tmp_path), INTERRUPT_AT=at)
    assert (ended.returncode, ended.stderr) == (130, "main_deit.py: interrupted\n")


def test_importing_a_command_leaves_interruptions_alone() -> None:
    code = (
        "import signal, sys; sys.path.insert(0, 'scripts'); import _root, visualize;"
        " print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    assert run("-c", code).stdout == "True\n"


# A command that prints many lines, and one that prints few, which Python keeps until its end.
PRINTS = (
    "import sys, utils; sys.argv = ['tool.py']; utils.run_command(lambda: print('line\\n' * {lines}, end=''))"
)


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [2, 100_000])
def test_a_reader_that_has_gone_ends_a_command_quietly(lines: int, unbuffered: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PRINTS.format(lines=lines)]
    shell = f"{shlex.join(command)} 2> {tmp_path / 'err'} | true; echo ${{PIPESTATUS[0]}}"
    # `true` has ended long before torch is imported.
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run(["bash", "-c", shell], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (ended.stdout, (tmp_path / "err").read_text()) == ("141\n", "")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("lines", [2, 100_000])
def test_a_full_disk_is_a_failure_of_one_line(lines: int) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", PRINTS.format(lines=lines)],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert ended.returncode == 1
    assert ended.stderr == "tool.py: failed: [Errno 28] No space left on device\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("main", "redirect", "code"),
    [("lambda: print('x')", ">&-", 0), ("lambda: open('missing')", "2> /dev/full", 2)],
)
def test_exit_codes_hold_where_nothing_can_be_written(main: str, redirect: str, code: int) -> None:
    text = f"import sys, utils; sys.argv = ['tool.py']; utils.run_command({main})"
    shell = f"{shlex.join([sys.executable, '-c', text])} {redirect}"
    ended = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (code, "")
