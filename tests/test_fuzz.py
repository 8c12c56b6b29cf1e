"""Random flags, broken checkpoints, broken images: every command succeeds or says in a line what is wrong.

FUZZ_CASES sets the number of random cases of each of the three kinds, FUZZ_REPORT a file for the counts.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from cases import ROOT
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import utils
from checkpointing.format import save_checkpoint

pytestmark = pytest.mark.slow

sys.path.insert(0, str(ROOT / "scripts"))
CASES = int(os.environ.get("FUZZ_CASES", 20))
QUIET = settings(
    max_examples=CASES,
    deadline=None,
    derandomize="FUZZ_CASES" not in os.environ,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # cases are small already
    suppress_health_check=list(HealthCheck),
)
COUNTS: Counter[str] = Counter()

# Each command on little work; {folder} holds images, {checkpoint} a checkpoint, {out} is empty.
COMMANDS = {
    "main_deit": "--model lf_deit_nano --data-path {folder} --epochs 1 --batch-size 32 --num_workers 0"
    " --device cpu --output_dir {out}/run",
    "dynamic_inference": "--checkpoint_path {checkpoint} --data_url {folder} --num_workers 0 --device cpu"
    " --repeats 1",
    "visualize": "--resume {checkpoint} --data-path {folder} --num-images 2 --num_workers 0 --device cpu"
    " --output_dir {out}/pictures",
    "benchmark": "--models deit_nano --baseline deit_nano --batch-size 2 --repeats 1 --seconds 0 --warmup 0"
    " --device cpu --csv {out}/speed.csv",
    "convert_checkpoint": "{checkpoint} {out}/ours.pth",
    "make_token_labels": "--checkpoint {plain} --data-path {folder} --output {out}/labels --top-k 2"
    " --num_workers 0 --device cpu",
    "folder2lmdb": "--dir {folder} --output {out}/lmdb --num_workers 1",
}
# What would take long, leave the machine or start processes.
LEFT_OUT = {"help", "download", "num_workers", "workers", "threads", "compile", "list", "max_batch", "loader"}
LEFT_OUT |= {"test_speed", "only_test_speed", "max_side"}
NUMBERS = ["-1", "0", "1", "2", "3", "0.3", "1.5", "nan", "inf", "-inf", "1e400", "x", ""]
TEXTS = [
    "",
    "nope",
    "../up",
    "{folder}",
    "{folder}/val/blue/00.png",
    "{checkpoint}",
    "{out}/none/x",
    "a\nb",
    "ü",
]
TEXTS += ["none", "{out}", "[1, 2]", "__import__('os').abort()", "patch_size=8", "region_size=9", "depth=0"]
TEXTS += ["lf_deit_nano", "evit_deit_nano", "hfds/imagefolder", "wds/x"]


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser that a command uses."""
    patch, found = pytest.MonkeyPatch(), []

    def parse_args(self, *args, **kwargs):
        found.append(self)
        raise KeyboardInterrupt

    patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    patch.setattr(sys, "argv", [name])
    with contextlib.suppress(KeyboardInterrupt), contextlib.redirect_stderr(io.StringIO()):
        importlib.import_module(name).main()
    patch.undo()
    return found[0]


def flags_of(name: str) -> dict[str, argparse.Action]:
    actions = parser_of(name)._actions
    return {a.option_strings[-1]: a for a in actions if a.option_strings and a.dest not in LEFT_OUT}


FLAGS = {name: flags_of(name) for name in COMMANDS}


def values_of(action: argparse.Action) -> st.SearchStrategy[list[str]]:
    """Values for one flag, fitting ones and others."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return st.just([])
    kind = action.type.kind if isinstance(action.type, utils.Number) else action.type
    pool = NUMBERS if kind in (int, float) else TEXTS + NUMBERS
    if kind is int:
        pool = pool + ["-1", "0", "1", "2", "5"] * 3
    if isinstance(action.default, int | float | str):  # else next to nothing would get past the first check
        pool = pool + [str(action.default)] * 8
    if action.choices:
        pool = [*map(str, action.choices), "nope"]
    one = st.sampled_from(pool)
    if isinstance(action.nargs, int):
        return st.lists(one, min_size=action.nargs, max_size=action.nargs)
    if action.nargs in ("*", "+"):
        return st.lists(one, max_size=3)
    return st.lists(one, min_size=1, max_size=1)


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, list[str]]:
    name = draw(st.sampled_from(list(COMMANDS)))
    argv = COMMANDS[name].split()
    for flag in draw(st.lists(st.sampled_from(list(FLAGS[name])), min_size=1, max_size=3, unique=True)):
        values = draw(values_of(FLAGS[name][flag]))
        argv += [f"{flag}={values[0]}"] if len(values) == 1 else [flag, *values]
    return name, argv


def call(name: str, argv: list[str]) -> tuple[int, str]:
    """Runs a command in this process; its exit code and what it wrote to standard error."""
    error, patch = io.StringIO(), pytest.MonkeyPatch()
    patch.setattr(sys, "argv", [f"{name}.py", *argv])
    patch.setenv("HF_HUB_OFFLINE", "1")
    code = 0
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            utils.run_command(importlib.import_module(name).main)
    except SystemExit as end:
        code = end.code
    finally:
        patch.undo()
        for handler in utils.log.handlers[:]:
            utils.log.removeHandler(handler)
            handler.close()
        utils.log.propagate = True
    return code, error.getvalue()


def check(kind: str, name: str, argv: list[str], out: Path) -> None:
    """Success, or exit code 2 with one line and nothing half done."""
    code, error = call(name, argv)
    COUNTS[f"{kind}, exit code {code}"] += 1
    assert code in (0, 2), f"{name} {argv}: exit code {code}\n{error}"
    assert "Traceback" not in error, f"{name} {argv}\n{error}"
    last = error.strip().splitlines()[-1] if error.strip() else ""
    if code:
        assert last.startswith(f"{name}.py: error: "), f"{name} {argv}\n{error}"
    half = [path for path in out.rglob("*") if ".tmp" in path.name]
    assert not half, f"{name} {argv}: {half}"
    for path in out.rglob("*.pth"):
        torch.load(path, weights_only=True)
    for path in out.rglob("*.json"):
        json.loads(path.read_text())


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    if os.environ.get("FUZZ_REPORT"):
        Path(os.environ["FUZZ_REPORT"]).write_text(json.dumps(COUNTS, indent=1) + "\n")


@contextlib.contextmanager
def workplace(sharp: Path, folder: Path):
    """A fresh folder with checkpoints, which commands may write to: what stands for the names in braces."""
    with tempfile.TemporaryDirectory() as root, contextlib.chdir(root):
        out, checkpoint = Path(root) / "out", Path(root) / "in" / "checkpoint.pth"
        out.mkdir()
        checkpoint.parent.mkdir()
        shutil.copy(sharp, checkpoint)
        model = timm.create_model("deit_nano", num_classes=4, depth=1)
        entries = dict(model_name="deit_nano", model_kwargs=dict(num_classes=4, depth=1))
        save_checkpoint(entries | {"model": model.state_dict()}, checkpoint.with_name("plain.pth"))
        yield dict(folder=folder, out=out, checkpoint=checkpoint, plain=checkpoint.with_name("plain.pth"))


@QUIET
@given(line=command_lines())
def test_any_flags(line: tuple[str, list[str]], folder: Path, sharp: Path) -> None:
    name, argv = line
    with workplace(sharp, folder) as places:
        for key, path in places.items():
            argv = [text.replace(f"{{{key}}}", str(path)) for text in argv]
        check("flags", name, argv, places["out"])


READERS = {
    "dynamic_inference": ["--eval-mode=0", "--eval-mode=1", "--eval-mode=3", "--images={folder}/val/blue"],
    "visualize": ["--threshold=0.5", "--curve"],
    "main_deit": [
        "--eval --resume={checkpoint}",
        "--resume={checkpoint} --epochs=3",
        "--finetune={checkpoint}",
    ],
    "convert_checkpoint": ["--model=lf_deit_nano"],
}
VALUES: list[Any] = [None, 0, -1, 3.5, float("nan"), "text", [], {}, [1, "x"], {"a": 1}, [[0.1]], True]
VALUES += [torch.zeros(0), torch.full((3, 3), float("nan"))]


def break_bytes(data: bytes, how: str, at: float, value: int) -> bytes:
    place = int(at * len(data))
    if how == "cut":
        return data[:place]
    if how == "flip":
        return data[:place] + bytes([data[place % len(data)] ^ (value or 1)]) + data[place + 1 :]
    if how == "insert":
        return data[:place] + bytes([value]) * 97 + data[place:]
    return bytes([value]) * place


def break_entry(checkpoint: dict, path: list[float], value: Any, remove: bool) -> None:
    """Replaces or removes an entry, found by going down the tree by shares."""
    while True:
        keys = sorted(checkpoint, key=str) if isinstance(checkpoint, dict) else list(range(len(checkpoint)))
        key = keys[int(path.pop(0) * len(keys))]
        inner = checkpoint[key]
        if not path or not isinstance(inner, dict | list) or not inner:
            break
        checkpoint = inner
    if remove:
        del checkpoint[key]
    else:
        checkpoint[key] = value


SHARES = st.floats(0, 1, exclude_max=True)


@QUIET
@given(
    reader=st.sampled_from([(name, flags) for name, many in READERS.items() for flags in many]),
    how=st.sampled_from(["cut", "flip", "insert", "fill", *["entry"] * 6]),
    path=st.lists(SHARES, min_size=1, max_size=3),
    value=st.integers(0, 255),
    entry=st.sampled_from(range(len(VALUES))),
    remove=st.booleans(),
)
@example(
    reader=("main_deit", "--resume={checkpoint} --epochs=3"),
    how="entry",
    path=[0.7534, 0.7534, 0.1957],  # an option of the optimizer
    value=0,
    entry=12,
    remove=False,
)
def test_any_checkpoint(
    reader: tuple[str, str], how: str, path: list[float], value: int, entry: int, remove: bool,
    folder: Path, sharp: Path,
) -> None:  # fmt: skip
    name, flags = reader
    with workplace(sharp, folder) as places:
        checkpoint = places["checkpoint"]
        if how == "entry":
            saved = torch.load(checkpoint, weights_only=True)
            saved |= {"flops": [0.1, 0.2], "budgeted_batch_classification": [[0.1, 0.2], [50.0, 60.0]]}
            break_entry(saved, list(path), VALUES[entry], remove)
            torch.save(saved, checkpoint)
        else:
            checkpoint.write_bytes(break_bytes(checkpoint.read_bytes(), how, path[0], value))
        argv = COMMANDS[name].replace(
            "--model lf_deit_nano ", "" if "resume" in flags else "--model lf_deit_nano "
        )
        check("checkpoints", name, f"{argv} {flags}".format(**places).split(), places["out"])


@QUIET
@given(
    how=st.sampled_from(["cut", "flip", "insert", "fill"]),
    at=SHARES,
    value=st.integers(0, 255),
    suffix=st.sampled_from([".png", ".jpg", ".gif", ".webp", ".tiff", ".bmp"]),
    allowed=st.sampled_from([0, 1]),
    command=st.sampled_from(["main_deit", "dynamic_inference", "visualize"]),
)
def test_any_image(
    how: str, at: float, value: int, suffix: str, allowed: int, command: str, folder: Path, sharp: Path
) -> None:
    from PIL import Image

    with workplace(sharp, folder) as places:
        images = places["out"].parent / "images"
        for source in folder.glob("*/*/0[0-7].png"):  # one batch to train on
            target = images / source.relative_to(folder)
            if target.parts[-3] == "train" or source.stem < "03":
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
        broken = images / "val" / "blue" / f"zz{suffix}"
        Image.open(folder / "val" / "blue" / "00.png").save(broken)
        broken.write_bytes(break_bytes(broken.read_bytes(), how, at, value))
        shutil.copy(broken, images / "train" / "blue" / broken.name)
        argv = COMMANDS[command].format(**places | {"folder": images}).split()
        argv += ["--model-kwargs", "embed_dim=32", "depth=2"] if command == "main_deit" else []
        check("images", command, [*argv, f"--max-bad-images={allowed}"], places["out"])


@pytest.mark.parametrize("name", COMMANDS)
def test_without_them_all_commands_succeed(name: str, folder: Path, sharp: Path) -> None:
    with workplace(sharp, folder) as places:
        code, error = call(name, COMMANDS[name].format(**places).split())
        assert code == 0, error


@pytest.mark.parametrize("kind", [ValueError, TypeError])
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "benchmark"])  # which has a row for it
def test_a_fault_of_our_own_does_not_pass_for_bad_input(
    name: str, kind: type[Exception], folder: Path, sharp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise kind("shapes do not match")

    monkeypatch.setattr("models.vit.Block.attend", fail)
    monkeypatch.setattr("datasets.Folder.load", fail)
    monkeypatch.setattr("loading.archives.pack", fail)
    with workplace(sharp, folder) as places, pytest.raises(kind, match="shapes do not match"):
        call(name, COMMANDS[name].format(**places).split())


@pytest.mark.parametrize("kind", [ValueError, TypeError])
def test_a_fault_of_a_constructor_does_not_pass_for_bad_input(
    kind: type[Exception], folder: Path, sharp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise kind("__init__() got an unexpected keyword argument 'width'")

    for name in ("main_deit", "dynamic_inference", "visualize", "benchmark"):
        with workplace(sharp, folder) as places, monkeypatch.context() as patch:
            patch.setattr("models.vit.Attention.__init__", fail)
            with pytest.raises(kind, match="width"):
                call(name, COMMANDS[name].format(**places).split())
