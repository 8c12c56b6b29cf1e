"""A method outside the project runs in every command by registration alone, alone and inside another."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import ROOT, Command, call, run
from PIL import Image
from safetensors.torch import load_file

from checkpointing.format import load_checkpoint, load_json
from models import registry
from models.cost import exit_gflops, stage_gflops, token_gflops

pytestmark = pytest.mark.slow

sys.path.insert(0, str(ROOT / "scripts"))
NAMES = ("toy_deit_nano", "toy_nano", "toy_lf_deit_nano")
ALONE, COMBINED = NAMES[0], NAMES[2]
SIZE = ["--model-kwargs", "embed_dim=32", "depth=3", "num_heads=2"]
TRAIN = ["--batch-size", 32, "--device", "cpu", "--num_workers", 0, *SIZE]


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[None]:
    """Registers the toys for this module alone: others enumerate what is registered."""
    import toy_method

    assert all(registry.registered[name][0].__module__ == toy_method.__name__ for name in NAMES)
    yield
    for name in NAMES:
        registry.registered.pop(name)


@pytest.fixture(scope="module", params=[ALONE, COMBINED])
def output(request, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one epoch; of the one alone from a process that has imported the toy for it."""
    path = tmp_path_factory.mktemp("toy") / request.param
    start = "import sys, runpy; sys.path.insert(0, 'tests'); import toy_method;"
    start += (
        " sys.argv = ['main_deit.py', *sys.argv[1:]]; runpy.run_path('main_deit.py', run_name='__main__')"
    )
    flags = ["--model", request.param, "--data-path", folder, "--output_dir", path, "--epochs", 1]
    flags += ["--far", 20, *TRAIN]
    if request.param == ALONE:
        ended = run("-c", start, *flags)
        assert ended.returncode == 0, ended.stderr
    else:
        call("main_deit", *flags)
    return path


@pytest.fixture
def checkpoint(output: Path) -> Path:
    return output / "checkpoint.pth"


def test_it_is_trained_with_its_flag_its_recipe_and_its_statistics(output: Path, checkpoint: Path) -> None:
    saved, entry = load_checkpoint(checkpoint), json.loads((output / "log.txt").read_text())
    assert saved["model_name"] == output.name and saved["model_kwargs"]["far"] == 20
    assert saved["model_kwargs"]["far_from_epoch"] == 0.25  # of one epoch
    assert saved["args"]["lr"] == 1e-3
    assert entry["test_patches_left"] == 20 < entry["train_patches_left"]  # two batches: the first keeps all


def test_it_goes_on_where_it_stopped(
    command: Command, folder: Path, output: Path, checkpoint: Path, tmp_path: Path
) -> None:
    flags = ["--data-path", folder, "--output_dir", tmp_path, "--num_workers", 0]
    ended = command("main_deit", *flags, "--resume", checkpoint, "--epochs", 2)
    assert ended.code == 0, ended.err
    saved, entry = (
        load_checkpoint(tmp_path / "checkpoint.pth"),
        json.loads((tmp_path / "log.txt").read_text()),
    )
    assert saved["epoch"] == 1 and saved["model_kwargs"]["far"] == 20
    ended = command("main_deit", *flags, "--resume", tmp_path / "checkpoint.pth", "--eval")
    assert ended.code == 0, ended.err
    assert all(f"{key} {entry[key]:.3f}" in ended.err for key in entry if key.startswith("test_"))


@pytest.mark.parametrize("mode", range(4))
def test_it_is_evaluated(mode: int, command: Command, folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    flags = ["--checkpoint_path", checkpoint, "--data_url", folder, "--num_workers", 0, "--repeats", 1]
    extra = ["--baseline", "deit_nano"] if mode == 2 else []
    if mode == 3:
        results.write_text("{}")
    ended = command("dynamic_inference", *flags, "--eval-mode", mode, "--results", results, *extra)
    assert ended.code == 0, ended.err
    if mode == 3:
        assert checkpoint.parent.name in ended.out
    else:
        stored = load_json(results)
        saved = load_checkpoint(checkpoint)
        model = timm.create_model(saved["model_name"], **saved["model_kwargs"])
        assert stored["flops"] == pytest.approx(exit_gflops(model))


def test_its_knob_is_swept_in_whole_numbers(
    command: Command, folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results.json"
    flags = ["--checkpoint_path", checkpoint, "--data_url", folder, "--num_workers", 0]
    ended = command("dynamic_inference", *flags, "--vary", "far", 5, 20, "--results", results)
    assert ended.code == 0, ended.err
    (low, high), _ = load_json(results)["budgeted_batch_classification"]
    assert low < high
    assert load_json(results)["varied"] == {"far": [5, 20]}


def test_it_predicts_pictures(command: Command, folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--checkpoint_path", checkpoint, "--images", folder / "val" / "amber", "--num_workers", 0]
    ended = command("dynamic_inference", *flags, "--output", tmp_path / "a.csv", "--threshold", 1)
    assert ended.code == 0, ended.err
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    alone = checkpoint.parent.name == ALONE
    assert len(rows) == 10 and {row["exit"] for row in rows} == {"thinned" if alone else "focus"}
    assert all(bool(row["region"]) != alone for row in rows)


def test_it_is_drawn(command: Command, folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--resume", checkpoint, "--data-path", folder, "--num-images", 2, "--threshold", 1]
    ended = command("visualize", *flags, "--output_dir", tmp_path, "--device", "cpu")
    assert ended.code == 0, ended.err
    (picture, _) = (path for path in tmp_path.iterdir() if path.name != "contact_sheet.png")
    assert Image.open(picture).width > 2 * 224  # the input and what stays, at least


def test_it_is_timed(command: Command, tmp_path: Path) -> None:
    models = [f"{name}:embed_dim=32,depth=3,num_heads=2,far=20" for name in (ALONE, COMBINED)]
    flags = ["--models", *models, "--baseline", "deit_nano", "--batch-size", 2, "--device", "cpu"]
    flags += ["--repeats", 1, "--seconds", 0, "--csv", tmp_path / "a.csv"]
    ended = command("benchmark", *flags)
    assert ended.code == 0, ended.err
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    points = ["one exit", "all stages", "early exit, 78 % at first exit"]
    assert [row["operating_point"] for row in rows] == points
    assert all(row["speedup"] and row["gflops"] and not row["error"] for row in rows)


@pytest.mark.parametrize("name", ["toy.pth", "toy.safetensors"])
def test_it_is_converted(name: str, command: Command, checkpoint: Path, tmp_path: Path) -> None:
    ended = command("convert_checkpoint", checkpoint, tmp_path / name)
    assert ended.code == 0, ended.err
    converted, weights = load_checkpoint(tmp_path / name), load_checkpoint(checkpoint)["model"]
    assert converted["model_name"] == checkpoint.parent.name and converted["model_kwargs"]["far"] == 20
    assert converted["model"].keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in converted["model"].items())
    if name.endswith("safetensors"):
        assert load_file(tmp_path / name).keys() == weights.keys()


def test_its_cost_is_the_closed_form() -> None:
    model = timm.create_model(ALONE, embed_dim=32, depth=3, num_heads=2, far=20)
    (counted,) = stage_gflops(model)
    tokens = torch.tensor([[197, 197, 21]])
    assert counted == pytest.approx(token_gflops(model, tokens).item(), rel=1e-9)
    # A block: 12 C^2 for the linear layers and 10 C for the norms of a token, 2 N^2 C for the attention.
    per_token = 12 * 32**2 + 10 * 32
    blocks = sum(n * per_token + 2 * n**2 * 32 for n in (197, 197, 21))
    assert counted == pytest.approx((196 * 48 * 32 + blocks + 5 * 32 + 320) / 1e9, rel=1e-9)


def test_the_patches_that_stay_are_the_farthest_by_brute_force() -> None:
    torch.manual_seed(0)
    model, images = timm.create_model(ALONE, far=6).eval(), torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        x = model.blocks[0](model.embed(images))
        qkv = model.blocks[1].attn.qkv(model.blocks[1].norm1(x)).view(3, 197, 3, 4, 16)
        chosen = model(images)[0].info["far"]
    for keys, own in zip(qkv[:, 1:, 1].mean(dim=2), chosen, strict=True):
        distances = [(key - keys.mean(dim=0)).norm().item() for key in keys]
        assert own.tolist() == sorted(range(196), key=lambda i: -distances[i])[:6]


def test_inside_two_stages_it_trains_a_step() -> None:
    torch.manual_seed(0)
    model = timm.create_model(COMBINED, embed_dim=32, depth=3, num_heads=2, far=20).train()
    model.set_epoch(0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = [parameter.clone() for parameter in model.parameters()]
    outputs = model(torch.randn(4, 3, 56, 56))
    assert outputs[1].info["far"].shape == (4, 20) and "far" not in outputs[0].info
    terms = model.loss(outputs, torch.arange(4), F.cross_entropy)
    assert terms.keys() == {"fine_ce", "coarse_kl"} and all(term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_inside_two_stages_all_tokens_are_the_plain_model() -> None:
    torch.manual_seed(0)
    model = timm.create_model(COMBINED, far=196).eval()
    plain = timm.create_model("lf_deit_nano").eval()
    plain.load_state_dict(model.state_dict())
    images = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        for ours, theirs in zip(model(images), plain(images), strict=True):
            torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=0)
