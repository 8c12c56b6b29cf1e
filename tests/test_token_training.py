"""Training on token labels: the exact command on a small folder, and its refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from cases import Command

from checkpointing.format import load_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture
def labels(folder: Path, tmp_path: Path) -> Path:
    """A label file per training image: its own class in every cell, the next one behind."""
    for number, name in enumerate(sorted(entry.name for entry in (folder / "train").iterdir())):
        (tmp_path / "labels" / name).mkdir(parents=True)
        label = torch.stack([torch.tensor([8.0, 1.0]), torch.tensor([number, (number + 1) % 4])])  # [2,T]
        for image in (folder / "train" / name).iterdir():
            target = tmp_path / "labels" / name / f"{image.name.split('.')[0]}.pt"
            torch.save(label[:, :, None, None].expand(2, 2, 6, 6).clone(), target)
    return tmp_path / "labels"


FLAGS = "--model cf_lvvit_nano --epochs 2 -b 16 --device cpu --num_workers 0 --token-label".split()


def test_the_published_flags_train_on_token_labels(
    command: Command, folder: Path, labels: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    extra = ["--token-label-data", labels, "--model-ema", "--eval-metric", "top1_f", "--cooldown-epochs", 0]
    ended = command("main_deit", folder, *FLAGS, *extra, "--output_dir", out)
    assert ended.code == 0, ended.err
    entries = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert len(entries) == 2
    for entry in entries:
        parts = [entry[f"train_{name}"] for name in ("fine_ce", "token_ce", "coarse_kl")]
        assert entry["train_loss"] == pytest.approx(sum(parts), rel=1e-5)
    saved = load_checkpoint(out / "checkpoint.pth")
    assert saved["args"]["lr"] == 1.6e-3 and saved["args"]["unscale_lr"] and saved["args"]["mixup"] == 0
    assert saved["data_config"]["crop_pct"] == 0.9
    assert saved["best"] == max(entry["ema_exit1_acc1"] for entry in entries)  # LV-ViT's average decides


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--token-label"], "--token-label-data DIR"),
        (["--token-label", "--token-label-data", "nowhere"], "no token label at nowhere"),
        (["--token-label", "--token-label-data", "nowhere", "--mixup", "0.8"], "--mixup 0"),
        (["--token-label", "--token-label-data", "nowhere", "--no-aug"], "without --no-aug"),
    ],
)
def test_token_labels_that_cannot_be_had_are_one_line(
    command: Command, folder: Path, flags: list[str], words: str
) -> None:
    ended = command("main_deit", folder, *FLAGS[:-1], *flags)
    assert ended.code == 2 and words in ended.err and len(ended.err.strip().splitlines()) == 1


def test_a_model_without_a_token_loss_says_so(command: Command, folder: Path, labels: Path) -> None:
    flags = ["--model", "lf_deit_nano", *FLAGS[2:], "--token-label-data", labels, "--mixup", 0, "--cutmix", 0]
    ended = command("main_deit", folder, *flags)
    assert ended.code == 2 and "has no loss for them" in ended.err


def test_a_single_missing_label_is_named(command: Command, folder: Path, labels: Path) -> None:
    shutil.rmtree(labels / sorted(entry.name for entry in labels.iterdir())[2])
    ended = command("main_deit", folder, *FLAGS, "--token-label-data", labels)
    assert ended.code == 2 and "no token label at" in ended.err and "Traceback" not in ended.err


def test_labels_reach_the_loss_however_images_are_normalised(
    command: Command, folder: Path, labels: Path, tmp_path: Path
) -> None:
    losses = []
    for extra in ([], ["--device-normalize"]):
        out = tmp_path / f"out{len(extra)}"
        flags = [*FLAGS, "--token-label-data", labels, "--reprob", 0, *extra]
        ended = command("main_deit", folder, *flags, "--output_dir", out)
        assert ended.code == 0, ended.err
        losses.append([json.loads(line)["train_loss"] for line in (out / "log.txt").read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
