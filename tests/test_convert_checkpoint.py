"""Published layouts become ours: same weights, same logits, and nothing in a file is ever run."""

import argparse
import os
from pathlib import Path

import pytest
import timm
import torch
from cases import ROOT, Command
from safetensors.torch import save_file

import models  # noqa: F401  (registers the models)
from checkpointing.format import Results, load_checkpoint, save_checkpoint
from models.cost import exit_gflops
from models.weights import model_from_checkpoint

DEIT = dict(embed_dim=24, depth=2, num_heads=3, num_classes=7, patch_size=4)
# Model, its arguments, and what its authors' file holds beside the weights under `key`.
LAYOUTS = {
    "lf": ("lf_deit_small", DEIT, "model", {"flops": [1.0, 2.0], "epoch": 3}),
    "cf": ("cf_deit_small", DEIT, "model", {"flop": [1.0, 2.0], "anytime_classification": [70.0, 80.0]}),
    "evit": ("evit_deit_small", DEIT | dict(img_size=28, drop_loc=[1]), "model", {"model_ema": None}),
    "avit": ("avit_deit_small", DEIT | dict(img_size=28), "model", {"args": argparse.Namespace(lr=0.1)}),
    "dvt": (
        "dvt_deit_nano",
        dict(embed_dim=16, depth=2, num_heads=2, num_classes=7),
        "model_state_dict",
        {
            "flops": [1.0, 2.0, 3.0],
            "dynamic_threshold": torch.rand(59, 3),
            "anytime_classification": [1, 2, 3],
        },
    ),
    "timm": ("deit_nano", DEIT | dict(img_size=28), None, {}),
    "state_dict": ("deit_nano", DEIT | dict(img_size=28), "state_dict", {"arch": "deit"}),
}


def write(layout: str, path: Path) -> torch.nn.Module:
    """Writes a file of this layout with random weights; returns their model."""
    name, kwargs, key, beside = LAYOUTS[layout]
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    state = model.state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({key: state} | {k: v for k, v in beside.items() if v is not None} if key else state, path)
    return model


def flags(layout: str) -> list[str]:
    name, kwargs, *_ = LAYOUTS[layout]
    pairs = [f"{key}={value}" for key, value in kwargs.items() if key != "num_classes"]
    return ["--model", name, "--model-kwargs", *pairs]


@pytest.fixture
def convert(command: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return lambda *argv: command("convert_checkpoint", *argv)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [".pth", ".safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_converted_and_read_without_further_flags(
    layout: str, kind: str, convert, tmp_path: Path
) -> None:
    source, target = tmp_path / "theirs.pth", tmp_path / "new" / f"ours{kind}"
    model = write(layout, source)
    (tmp_path / "names.txt").write_text("\n".join("abcdefg"))
    ended = convert(source, target, *flags(layout), "--classes", tmp_path / "names.txt")
    assert ended.code == 0, ended.err
    found = load_checkpoint(target)
    again, name, kwargs = model_from_checkpoint(found, "ours", None, {})
    assert (
        name == LAYOUTS[layout][0] and kwargs["num_classes"] == 7 and found["class_names"] == list("abcdefg")
    )
    images = torch.randn(2, 3, model.img_size, model.img_size)
    with torch.inference_mode():
        for ours, theirs in zip(again.eval()(images), model(images), strict=True):
            assert torch.equal(ours.logits, theirs.logits)
    results = Results.of(found)
    assert results.flops == pytest.approx(exit_gflops(model))  # counted, whatever the file said
    beside = LAYOUTS[layout][3]
    if "dynamic_threshold" in beside:
        torch.testing.assert_close(torch.tensor(results.dynamic_threshold), beside["dynamic_threshold"])
    assert results.anytime_classification == beside.get("anytime_classification")


def test_safetensors_are_taken_and_averaged_weights_if_asked(convert, tmp_path: Path) -> None:
    model = write("timm", tmp_path / "theirs.safetensors")
    ended = convert(tmp_path / "theirs.safetensors", tmp_path / "ours.pth", *flags("timm"))
    assert ended.code == 0, ended.err
    checkpoint = load_checkpoint(tmp_path / "ours.pth")
    averaged = {name: value + 1 for name, value in model.state_dict().items()}
    measured = {"anytime_classification": [70.0]}  # with its own weights
    save_checkpoint(checkpoint | {"model_ema": averaged} | measured, tmp_path / "both.pth")
    ended = convert(tmp_path / "both.pth", tmp_path / "ema.safetensors", "--use-ema")
    assert ended.code == 0, ended.err
    assert "anytime_classification" not in load_checkpoint(tmp_path / "ema.safetensors")
    found = load_checkpoint(tmp_path / "ema.safetensors")["model"]
    assert all(torch.equal(found[name], value) for name, value in averaged.items())
    assert "averaged weights (model_ema), 7 classes" in ended.err
    # The weights that the best epoch was chosen by are the default, and those of a file that has no others.
    save_checkpoint(checkpoint | {"model_ema": averaged, "best_weights": "model_ema"}, tmp_path / "best.pth")
    torch.save({"state_dict_ema": averaged}, tmp_path / "alone.pth")
    for name, more in (("best", []), ("alone", ["--use-ema", *flags("timm")]), ("best", ["--no-use-ema"])):
        target = tmp_path / f"{name}{len(more)}.safetensors"
        ended = convert(tmp_path / f"{name}.pth", target, *more)
        assert ended.code == 0, ended.err
        wanted = model.state_dict() if "--no-use-ema" in more else averaged
        found = load_checkpoint(target)
        assert all(torch.equal(found["model"][key], value) for key, value in wanted.items())
        assert "best_weights" not in found  # it holds these alone


def test_how_foreign_images_are_prepared_can_be_told(convert, tmp_path: Path) -> None:
    write("timm", tmp_path / "theirs.pth")
    more = "--mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --crop-pct 0.9".split()
    ended = convert(tmp_path / "theirs.pth", tmp_path / "ours.pth", *flags("timm"), *more)
    assert ended.code == 0, ended.err
    config = load_checkpoint(tmp_path / "ours.pth")["data_config"]
    assert config == dict(mean=[0.5] * 3, std=[0.5] * 3, crop_pct=0.9, interpolation="bicubic")


@pytest.mark.parametrize("name, gates", [("small-10-75.pth", (10, 75)), ("tiny-5-8.5.pth", (5, 8.5))])
def test_gates_come_from_a_published_files_name_and_flags_win(
    name: str, gates: tuple, convert, tmp_path: Path
) -> None:
    write("avit", tmp_path / name)
    for more, wanted in (([], gates), (["gate_center=3"], (gates[0], 3))):
        target = tmp_path / f"ours{len(more)}.pth"
        ended = convert(tmp_path / name, target, *flags("avit"), *more)
        assert ended.code == 0, ended.err
        kwargs = load_checkpoint(target)["model_kwargs"]
        assert (kwargs["gate_scale"], kwargs["gate_center"]) == wanted


class Hostile:
    """Pickles to a command that makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_a_file_is_refused_and_not_run(convert, tmp_path: Path) -> None:
    model = timm.create_model("deit_nano", **LAYOUTS["timm"][1])
    torch.save({"model": model.state_dict(), "args": Hostile(tmp_path / "run")}, tmp_path / "theirs.pth")
    ended = convert(tmp_path / "theirs.pth", tmp_path / "ours.pth", *flags("timm"))
    assert ended.code == 2 and ended.err.count("\n") == 1, ended.err
    assert not (tmp_path / "run").exists() and not (tmp_path / "ours.pth").exists()


@pytest.mark.parametrize(
    "argv, said",
    [
        (["{source}", "{source}"], "is there already"),
        (["{source}", "{folder}/ours.bin"], "name a .pth or a .safetensors file"),
        (["{source}", "{folder}/ours.pth", "--model", "lf_deit_nano"], "does not fit the model"),
        (["{source}", "{folder}/ours.pth"], "no model given"),
        (["{folder}/none.pth", "{folder}/ours.pth"], "no checkpoint at"),
        (["{source}", "{folder}/ours.pth", *flags("timm"), "--classes", "{source}.txt"], "has 2 lines"),
    ],
)
def test_bad_input_is_one_line(argv: list, said: str, convert, tmp_path: Path) -> None:
    write("timm", tmp_path / "theirs.pth")
    (tmp_path / "theirs.pth.txt").write_text("a\nb\n")
    ended = convert(*(text.format(source=tmp_path / "theirs.pth", folder=tmp_path) for text in argv))
    assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1, ended.err
