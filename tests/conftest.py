"""Fixtures: a folder of small pictures, and what the training command leaves after two epochs on it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Command, call
from PIL import Image

from checkpointing.format import load_checkpoint, save_checkpoint

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other

CLASSES = ("amber", "blue", "coral", "dusk")
COUNTS = {"train": 16, "val": 10}  # images per class


def draw_picture(generator: np.random.Generator, label: int) -> Image.Image:
    """56 x 56 pixels of noise with a bright square, whose corner of the picture is the class."""
    pixels = generator.integers(0, 120, (56, 56, 3), dtype=np.uint8)
    top, left = 28 * (label // 2) + generator.integers(0, 12), 28 * (label % 2) + generator.integers(0, 12)
    pixels[top : top + 16, left : left + 16] += 120
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder: 4 classes, 64 training and 40 validation images. Not to be written to."""
    root, generator = tmp_path_factory.mktemp("data") / "pictures", np.random.default_rng(0)
    for split, count in COUNTS.items():
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                draw_picture(generator, label).save(root / split / name / f"{number:02}.png")
    return root


@pytest.fixture(scope="session")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of two epochs of training. Not to be written to: copy the checkpoint."""
    output = tmp_path_factory.mktemp("trained") / "output"
    flags = f"--model lf_deit_nano --data-path {folder} --epochs 2 --batch-size 32 --device cpu"
    call("main_deit", *flags.split(), "--num_workers", 0, "--output_dir", output)
    return output


@pytest.fixture(scope="session")
def sharp(folder: Path, trained: Path) -> Path:
    """The trained checkpoint with a head that makes confidences and predictions differ. Copy it to write."""
    from datasets import DataSource
    from inference.session import open_model

    opened = open_model(load_checkpoint(trained / "checkpoint.pth"), "the trained model")
    model, data = opened.model.eval(), opened.dataset(DataSource("IMNET", folder), "val")
    with torch.no_grad():
        logits = torch.stack([out.logits for out in model(torch.stack([image for image, _ in data]))])
        model.head.bias -= logits.mean(dim=(0, 1))  # two epochs leave one class ahead for every image
        for parameter in model.head.parameters():
            parameter *= 15
    save_checkpoint(opened.checkpoint | {"model": model.state_dict()}, trained.parent / "sharp.pth")
    return trained.parent / "sharp.pth"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process: command("main_deit", "--epochs", 1, ...)."""
    return Command(monkeypatch, capsys)
