"""Token labels against the published targets, against pictures of coordinates, and from classifiers."""

import os
import pickle
import random
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from cases import ROOT, Command, load_case
from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP, RandAugment
from torch import Tensor, nn

import datasets
import utils
from checkpointing.format import load_json, save_json
from loading import token_labels
from loading.token_labels import (
    GEOMETRIC,
    PairedTransform,
    cell_picture,
    crop_map,
    follow,
    label_path,
    load_label,
    on_both,
    token_targets,
)
from models import AdaptiveViT

sys.path.insert(0, str(ROOT / "scripts"))
import make_token_labels

CASES = ["train_cf_lvvit_7x7_dense_p8", "train_cf_lvvit_7x7_select_p8"]
RAW = dict(mean=[0.0] * 3, std=[1.0] * 3)  # model input in 0 .. 1, to read coordinates from
WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
SIZES = [(240, 240), (300, 200), (180, 330)]  # width, height
BLUE = (0, 0, 255)  # colour of what an operation uncovers; pictures of coordinates have no blue
CELLS = 18


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# Targets


@pytest.mark.parametrize("stem", CASES)
@pytest.mark.parametrize("order", ["target_xy_corrected", "target"])
def test_targets_equal_the_published_codes(stem: str, order: str) -> None:
    """The published targets follow from x and y exchanged, which proves the reading of the corrected ones."""
    meta, _, _, stored = load_case(stem)
    label, tokens, cls = (
        torch.from_numpy(stored[name])
        for name in ("input.label_map", f"output.{order}_tokens_step", f"output.{order}_cls")
    )
    top, left, height, width = label[:, 2, 0, 0, :4].unbind(1)
    if order == "target":
        top, left, height, width = left, top, width, height
    box = torch.stack([left, top, width, height], dim=1)
    size, classes = meta["label_size"], meta["ctor"]["num_classes"]
    targets = token_targets(label[:, :2], box, classes, size, meta["label_smoothing"])
    assert targets.shape == (meta["batch"], classes, 1 + size**2)
    torch.testing.assert_close(targets[..., 0], cls[..., 1], atol=1e-6, rtol=0)
    torch.testing.assert_close(targets[..., 1 :: meta["token_step"]], tokens, atol=1e-6, rtol=0)


def random_labels(batch: int, classes: int, cells: int = 6, top: int = 3) -> tuple[Tensor, Tensor]:
    """Labels [B,2,T,G,G] and crops [B,4]."""
    best = torch.randn(batch, classes, cells, cells).topk(top, dim=1)
    corner = torch.rand(batch, 2) * 0.5
    box = torch.cat([corner, (1 - corner) * (0.2 + 0.8 * torch.rand(batch, 2))], dim=1)
    return torch.stack([4 * best.values, best.indices.float()], dim=1), box


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_rows_sum_to_one_and_the_smoothing(smoothing: float) -> None:
    seed_all(0)
    targets = token_targets(*random_labels(3, 7), 7, 4, smoothing)
    torch.testing.assert_close(targets.sum(dim=1), torch.full((3, 17), 1 + smoothing / 7))


def test_batch_of_one_is_a_row_of_the_batch() -> None:
    seed_all(1)
    label, box = random_labels(3, 9)
    whole = token_targets(label, box, 9, 5)
    for i in range(3):
        one = token_targets(label[i : i + 1], box[i : i + 1], 9, 5)
        torch.testing.assert_close(one, whole[i : i + 1])
        half = token_targets(label[i : i + 1].half(), box[i : i + 1], 9, 5)
        torch.testing.assert_close(half, one, atol=5e-3, rtol=0)


def test_whole_picture_on_its_own_grid_is_the_label() -> None:
    seed_all(2)
    label, _ = random_labels(2, 8, cells=5, top=8)  # all classes are kept
    logits = torch.zeros(2, 8, 5, 5).scatter(1, label[:, 1].long(), label[:, 0])
    targets = token_targets(label, WHOLE.expand(2, -1), 8, 5, smoothing=0)
    torch.testing.assert_close(targets[..., 1:], logits.softmax(dim=1).flatten(2))
    torch.testing.assert_close(targets[..., 0], logits.mean(dim=(2, 3)).softmax(dim=1))


def test_crop_map_reads_where_the_crop_is() -> None:
    """On a map of coordinates, every cell of a crop reads the coordinates of its own centre."""
    centre = (torch.arange(10) + 0.5) / 10
    dense = torch.stack([centre.expand(10, -1), centre[:, None].expand(-1, 10)])[None]  # x, y
    x, y = crop_map(dense, torch.tensor([[0.2, 0.1, 0.5, 0.3]]), 4)[0]
    torch.testing.assert_close(x, (0.2 + 0.5 * (torch.arange(4) + 0.5) / 4).expand(4, -1))
    torch.testing.assert_close(y, (0.1 + 0.3 * (torch.arange(4) + 0.5) / 4)[:, None].expand(-1, 4))


# Augmentation: pixels that are their own coordinates, beside a label that is the same


def coordinate_picture(size: tuple[int, int]) -> Image.Image:
    """Red is x and green is y, as shares of the width and the height."""
    x, y = ((np.arange(side) + 0.5) / side for side in size)
    pixels = np.zeros((size[1], size[0], 3))
    pixels[..., 0], pixels[..., 1] = 255 * x, 255 * y[:, None]
    return Image.fromarray(pixels.round().astype(np.uint8))


def coordinate_label() -> Tensor:
    """Scores 1 + x and 1 + y of every cell's centre, [2,2,G,G]: 0 is outside; the classes are 0 and 1."""
    centre = 1 + (torch.arange(CELLS) + 0.5) / CELLS
    scores = torch.stack([centre.expand(CELLS, -1), centre[:, None].expand(-1, CELLS)])
    return torch.stack([scores, torch.tensor([0.0, 1.0])[:, None, None].expand(-1, CELLS, CELLS)])


def differences(image: Tensor, label: Tensor, box: Tensor, grid: int = 14) -> Tensor:
    """What picture and label say about x and y, [n,2] in cells of the label, where both show the picture.

    Args:
        image: [3,S,S] in 0 .. 1.
        label: [2,2,G,G].
        box: [4], the crop that the image is.
        grid: side of the grid to compare on.
    """
    assert set(label[1].unique().tolist()) <= {0, 1}
    maps = torch.cat([label[0] - 1, (label[0, :1] > 0).float()])
    *seen, inside = crop_map(maps[None], box[None], grid)[0]
    blue = F.max_pool2d(F.adaptive_max_pool2d(image[2:], grid), 3, stride=1, padding=1)[0]
    both = (inside > 0.999) & (blue < 0.02)
    shown = F.adaptive_avg_pool2d(image[:2], grid)
    return CELLS * (torch.stack(seen) - shown)[:, both].T


def check_agreement(errors: Tensor, least: int, mean: float = 0.15, lean: float = 0.05) -> None:
    """Less than a cell apart everywhere, far less on average, and with hardly a lean to one side."""
    assert len(errors) >= least
    assert errors.abs().max() < 0.8
    assert errors.abs().mean() < mean
    assert errors.mean(dim=0).abs().max() < lean


def coordinate_transform(size: int = 224, **augmentation) -> PairedTransform:
    """A transform that leaves colours as they are and paints blue what it uncovers."""
    transform = PairedTransform(size, RAW, **augmentation)
    for policy in transform.augment:
        if isinstance(policy, RandAugment):
            for op in policy.ops:
                op.kwargs["fillcolor"] = BLUE
                if op.name not in GEOMETRIC:
                    op.aug_fn = lambda pair, *args, **kwargs: pair
    return transform


PLAIN = dict(hflip=0, vflip=0, scale=(1, 1), ratio=(0.1, 10), color_jitter=None)  # the whole picture


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("flip", [{}, {"hflip": 1}, {"vflip": 1}, {"hflip": 1, "vflip": 1}])
def test_flips(size: tuple[int, int], flip: dict) -> None:
    image, label, box = coordinate_transform(**(PLAIN | {"ratio": (size[0] / size[1],) * 2} | flip))(
        coordinate_picture(size), coordinate_label()
    )
    assert box.tolist() == [0, 0, 1, 1]
    errors = differences(image, label, box, grid=CELLS)
    assert len(errors) == CELLS**2 and errors.abs().max() < 0.1
    assert (image[0, 0, 0] > 0.5) == ("hflip" in flip) and (image[1, 0, 0] > 0.5) == ("vflip" in flip)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("magnitude", [0, 3, 7, 10])
@pytest.mark.parametrize("name", sorted(GEOMETRIC))
def test_geometric_operations(name: str, magnitude: int, sign: int, size: tuple[int, int]) -> None:
    (value,) = LEVEL_TO_ARG[name](magnitude, {"translate_const": 100})
    pair = (coordinate_picture(size), cell_picture(size, CELLS))
    options = dict(fillcolor=BLUE, resample=Image.Resampling.BILINEAR)
    image, cells = on_both(NAME_TO_OP[name], True, pair, sign * abs(value), **options)
    label = follow(coordinate_label(), cells)
    pixels = torch.from_numpy(np.array(image.resize((224, 224), Image.Resampling.BOX)) / 255).permute(2, 0, 1)
    # A translation by a part of a cell is rounded, by half a cell at most and in all cells alike.
    lean = 0.52 if name.startswith("Translate") else 0.12
    check_agreement(differences(pixels.float(), label, WHOLE[0]), least=60, mean=0.34, lean=lean)
    if magnitude == 0:
        assert torch.equal(label, coordinate_label())
    else:
        assert not torch.equal(label, coordinate_label())


@pytest.mark.parametrize("name", sorted(NAME_TO_OP))
def test_only_the_geometric_operations_move_pixels(name: str) -> None:
    before = np.zeros((60, 60), dtype=bool)
    before[4:24, 32:52] = True
    image = Image.fromarray(np.where(before[..., None], [250, 200, 90], [30, 20, 10]).astype(np.uint8))
    options = dict(fillcolor=(30, 20, 10), resample=Image.Resampling.NEAREST)
    level = LEVEL_TO_ARG[name]
    arguments = level(7, {"translate_const": 20}) if level else ()
    pixels = np.asarray(NAME_TO_OP[name](image, *arguments, **options)).astype(int)
    bright, dark = pixels[12, 40], pixels[50, 10]
    after = abs(pixels - bright).sum(-1) < abs(pixels - dark).sum(-1)
    overlap = (before & after).sum() / (before | after).sum()
    assert (overlap < 0.8) == (name in GEOMETRIC)


@pytest.mark.parametrize("size", SIZES)
def test_crops(size: tuple[int, int]) -> None:
    transform = coordinate_transform(hflip=0, color_jitter=None, interpolation="random")
    picture, label, errors = coordinate_picture(size), coordinate_label(), []
    for seed in range(20):
        seed_all(seed)
        image, same, box = transform(picture, label)
        assert torch.equal(same, label)
        left, top, width, height = (box * torch.tensor([*size, *size])).tolist()
        corner = image[:2, :3, :3].mean(dim=(1, 2))  # a few pixels, read without the label
        torch.testing.assert_close(corner, torch.tensor([left / size[0], top / size[1]]), atol=0.02, rtol=0)
        assert width / height == pytest.approx(1, abs=0.4)
        errors.append(differences(image, label, box))
    check_agreement(torch.cat(errors), least=20 * 14**2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("always", [False, True])
def test_pipeline(size: tuple[int, int], always: bool) -> None:
    """The whole of it over many draws; `always` runs every operation that is drawn, not every other one."""
    transform = coordinate_transform(vflip=0.3, auto_augment="rand-m9-mstd0.5-inc1", interpolation="random")
    (policy,) = transform.augment
    if always:
        for op in policy.ops:
            op.prob = 1
    picture, kept, errors, moved = coordinate_picture(size), coordinate_label(), [], 0
    for seed in range(60):
        seed_all(seed)
        image, label, box = transform(picture, kept)
        moved += not any(torch.equal(label.flip(dims), kept) for dims in ([], [2], [3], [2, 3]))
        errors.append(differences(image, label, box))
    assert moved >= (25 if always else 10)  # draws with a geometric operation
    assert sum(len(one) > 40 for one in errors) >= 50
    check_agreement(torch.cat(errors), least=5000)


def test_two_operations_in_turn_are_followed_in_turn() -> None:
    """What the first one pushes out is not brought back by the second one."""
    pair = (coordinate_picture((180, 180)), cell_picture((180, 180), CELLS))
    for value in (0.4, -0.4):
        pair = on_both(NAME_TO_OP["TranslateXRel"], True, pair, value, fillcolor=BLUE, resample=0)
    label = follow(coordinate_label(), pair[1])
    gone = (torch.arange(CELLS) + 0.5) / CELLS < 0.4
    assert torch.equal((label[0] == 0)[0, 0], gone)
    assert torch.equal(label[..., ~gone], coordinate_label()[..., ~gone])


def test_scores_outside_are_zero_and_classes_stay_classes() -> None:
    seed_all(3)
    label = random_labels(1, 9, CELLS)[0][0]
    cells = NAME_TO_OP["Rotate"](cell_picture((90, 60), CELLS), 30, fillcolor=-1, resample=0)
    moved = follow(label, cells)
    outside = (moved[0] == 0).all(dim=0)
    assert 0 < outside.sum() < CELLS**2 / 2
    kept = {tuple(cell.tolist()) for cell in label.flatten(2).permute(2, 0, 1)[:, 1]}
    assert {tuple(cell.tolist()) for cell in moved.flatten(2).permute(2, 0, 1)[:, 1]} <= kept
    uniform = token_targets(moved[None], WHOLE, 9, CELLS, 0)[0, :, 1:].unflatten(1, (CELLS, CELLS))[
        :, outside
    ]
    torch.testing.assert_close(uniform, torch.full_like(uniform, 1 / 9))


def test_pictures_are_those_of_timm() -> None:
    """Normalisation, size and erasing; nothing is left of the pairing where all choices are off."""
    config = {"mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.9}
    picture = coordinate_picture((64, 64))
    image, label, box = PairedTransform(64, config, **PLAIN | {"ratio": (1, 1)})(picture, coordinate_label())
    whole = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    torch.testing.assert_close(image, (whole - 0.5) / 0.25)
    erase = dict(re_prob=1.0, re_mode="pixel", re_count=1)
    seed_all(0)
    erased, *_ = PairedTransform(64, config, **PLAIN | {"ratio": (1, 1)} | erase)(picture, coordinate_label())
    assert 0.01 < (erased != image).any(dim=0).float().mean() < 0.4


def test_draws_are_those_of_timm() -> None:
    """With equal seeds, RandAugment alone does to the picture what timm's own does."""
    policy = "rand-m9-mstd0.5-inc1"
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    paired = PairedTransform(32, datasets.DATA_CONFIG, auto_augment=policy).augment[0]
    plain = datasets.train_transform(32, datasets.DATA_CONFIG, auto_augment=policy)
    (plain,) = (step for step in plain.transforms if isinstance(step, RandAugment))
    for seed in range(20):
        seed_all(seed)
        expected = plain(picture)
        seed_all(seed)
        assert paired((picture, cell_picture(picture.size, 6)))[0] == expected


def test_transform_travels_to_a_worker() -> None:
    transform = PairedTransform(32, RAW, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25)
    seed_all(4)
    first = transform(coordinate_picture((40, 50)), coordinate_label())
    seed_all(4)
    second = pickle.loads(pickle.dumps(transform))(coordinate_picture((40, 50)), coordinate_label())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "wrong",
    [
        {"auto_augment": "augmix-m5"},
        {"auto_augment": "original"},
        {"auto_augment": "rand-q9"},
        {"interpolation": "cubist"},
        {"train_crop_mode": "rkrr"},
        {"no_aug": True},
        {"colour": 1},
    ],
)
def test_unknown_augmentation(wrong: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        PairedTransform(32, RAW, **wrong)


def test_no_policy() -> None:
    assert PairedTransform(32, RAW, auto_augment="none", color_jitter=None).augment == []


# Files


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("train/n01/n01_7.JPEG", "labels/n01/n01_7.pt"),
        ("train/n.01.x/7.tar.JPEG", "labels/n.01.x/7.pt"),
        ("/data.v2/train/cat/.hidden/a b.c.d.png", "labels/.hidden/a b.pt"),
        ("train/cat/plain", "labels/cat/plain.pt"),
    ],
)
def test_label_path(image: str, expected: str) -> None:
    assert label_path("labels", image) == label_path(Path("labels"), Path(image)) == Path(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int16, torch.uint8])
def test_label_of_any_type(tmp_path: Path, dtype: torch.dtype) -> None:
    label = torch.arange(2 * 3 * 16).view(2, 3, 4, 4).to(dtype)
    torch.save(label, tmp_path / "a.pt")
    loaded = load_label(tmp_path / "a.pt", num_classes=96)
    assert loaded.dtype == torch.float32 and torch.equal(loaded, label.float())


class Malice:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_label_does_not_run_code(tmp_path: Path) -> None:
    torch.save(Malice(tmp_path / "ran"), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt.*make_token_labels.py") as caught:
        load_label(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists() and "\n" not in str(caught.value)
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # the file would have


SCORES = torch.rand(1, 2, 3, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(2, 5, 4, 6), r"\[2, 5, 4, 6\]"),
        (torch.zeros(3, 5, 4, 4), r"\[3, 5, 4, 4\]"),
        (torch.zeros(2, 0, 4, 4), r"\[2, 0, 4, 4\]"),
        (torch.zeros(4, 4), r"\[4, 4\]"),
        ({"label": torch.zeros(2, 5, 4, 4)}, "a dict"),
        (torch.cat([SCORES, torch.full_like(SCORES, 10)]), "from 0 to 9"),
        (torch.cat([SCORES, torch.full_like(SCORES, -1)]), "from 0 to 9"),
        (torch.cat([SCORES, torch.full_like(SCORES, 1.5)]), "from 0 to 9"),
        (torch.cat([SCORES * torch.nan, torch.ones_like(SCORES)]), "finite"),
    ],
)
def test_label_with_wrong_content(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"a.pt.*{message}.*make_token_labels.py"):
        load_label(tmp_path / "a.pt", num_classes=10)


def test_label_that_is_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no token label at .*a.pt.*make_token_labels.py"):
        load_label(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(b"no tensor\n")
    with pytest.raises(ValueError, match="a.pt"):
        load_label(tmp_path / "a.pt")


# Labels from a classifier


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six pictures of two classes and several shapes."""
    generator = np.random.default_rng(0)
    for i, (width, height) in enumerate([(56, 56), (80, 50), (40, 90), (64, 64), (33, 57), (120, 60)]):
        folder = tmp_path / "data" / "train" / ("a.b", "c")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.x.png")
    return tmp_path / "data"


OTHER = dict(mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3], crop_pct=0.8, interpolation="bicubic")


def save_model(path: Path, name: str, sharpen: float = 20.0, **kwargs) -> nn.Module:
    """A random classifier, sure of itself, and its weights in a file."""
    seed_all(5)
    model = timm.create_model(name, num_classes=2, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.get_classifier().parameters() if "test" in name else model.head.parameters():
            parameter.normal_().mul_(sharpen / parameter.shape[-1] ** 0.5)
    checkpoint = {"model": model.state_dict(), "model_name": name, "class_names": ["a.b", "c"]}
    torch.save(checkpoint | ({"data_config": OTHER} if name == "deit_nano" else {}), path)
    return model


def squashed(path: Path, side: int, config: dict) -> Tensor:
    """Model input [1,3,S,S] of a whole picture, written out."""
    image = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return (pixels - mean) / std


def patch_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits [1,K,h,w] of every patch or cell, from the layers themselves."""
    if isinstance(model, AdaptiveViT):
        x = torch.cat([model.cls_token, model.patch_embed(images)], dim=1) + model.pos_embed
        x = model.norm(nn.Sequential(*model.blocks)(x))
    else:
        x = model.forward_features(images)
    if x.ndim == 3:
        side = int(x.shape[1] ** 0.5)
        x = x[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    head = model.fc if hasattr(model, "fc") else model.head
    return F.conv2d(x, head.weight[:, :, None, None], head.bias)


@pytest.mark.parametrize(
    ("name", "side", "kwargs"),
    [
        ("deit_nano", 56, {}),
        ("test_vit", 64, {"img_size": 64}),
        ("test_resnet", 96, {}),
    ],
)
@torch.inference_mode()
def test_labels_are_the_classifiers_best(
    command: Command, pictures: Path, tmp_path: Path, name: str, side: int, kwargs: dict
) -> None:
    model = save_model(tmp_path / "model.pth", name, **kwargs)
    output = tmp_path / "labels"
    argv = ["--checkpoint", tmp_path / "model.pth", "--data-path", pictures, "--output", output]
    argv += "--batch-size 4 --num_workers 0 --device cpu --size 9 --top-k 1".split()
    if name != "deit_nano":
        argv += ["--model", name, "--img-size", side]
    ended = command("make_token_labels", *argv)
    assert ended.code == 0, ended.err
    assert "6 token labels made, 0 were there" in ended.out
    files = sorted(output.glob("*/*"))
    assert [str(file.relative_to(output)) for file in files] == [
        *("a.b/0.pt", "a.b/2.pt", "a.b/4.pt", "c/1.pt", "c/3.pt", "c/5.pt")
    ]
    # The checkpoint's own mean and so on, but for its centre crop.
    config = OTHER if name == "deit_nano" else model.pretrained_cfg
    for file in files:
        image = squashed(pictures / "train" / file.parent.name / f"{file.stem}.x.png", side, config)
        logits = F.interpolate(patch_logits(model, image), (9, 9), mode="bilinear", align_corners=False)
        label = load_label(file, num_classes=2)
        assert label.shape == (2, 1, 9, 9) and torch.load(file, weights_only=True).dtype == torch.float16
        assert file.stat().st_size < 4000  # a label alone, not its batch
        assert torch.equal(label[1, 0], logits[0].argmax(dim=0).float())
        assert len(label[1].unique()) == 2 or name == "test_resnet"
        # Training sees the classifier's own probabilities, though one of the two classes is not in the file.
        targets = token_targets(label[None], WHOLE, 2, 9, smoothing=0)[..., 1:]
        torch.testing.assert_close(targets, logits.softmax(dim=1).flatten(2), atol=3e-3, rtol=0)


def test_hidden_images_get_no_label(command: Command, pictures: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model.pth", "deit_nano")
    for name in (".ipynb_checkpoints/0.x.png", "c/._1.x.png"):
        (pictures / "train" / name).parent.mkdir(exist_ok=True)
        (pictures / "train" / name).write_bytes(b"no image")
    argv = ["--checkpoint", tmp_path / "model.pth", "--data-path", pictures, "--output", tmp_path / "labels"]
    ended = command("make_token_labels", *argv, "--top-k", 1, "--device", "cpu", "--num_workers", 0)
    assert ended.code == 0 and "6 token labels made" in ended.out, ended.err
    assert "train: left out: 2 hidden" in ended.err
    assert len(list((tmp_path / "labels").rglob("*.pt"))) == 6


def test_labels_of_other_classes_are_refused(command: Command, pictures: Path, tmp_path: Path) -> None:
    """Labels name classes by number: without the folder a.b, those of c would mean another class."""
    save_model(tmp_path / "model.pth", "deit_nano")
    output = tmp_path / "labels"
    argv = ["--checkpoint", tmp_path / "model.pth", "--data-path", pictures, "--output", output, "--top-k", 1]
    assert command("make_token_labels", *argv, "--device", "cpu", "--num_workers", 0).code == 0
    assert len(datasets.TokenLabelled(datasets.Folder(pictures / "train"), output, None)) == 6
    (pictures / "train" / "a.b").rename(pictures / "train" / "d")
    with pytest.raises(ValueError, match="token labels of other classes than"):
        datasets.TokenLabelled(datasets.Folder(pictures / "train"), output, None)
    # Labels whose record does not name the classes are taken as they are, and added to.
    (pictures / "train" / "d").rename(pictures / "train" / "a.b")
    record = load_json(output / "labels.json")
    assert record.pop("class_names") == ["a.b", "c"]
    save_json(record, output / "labels.json")
    assert len(datasets.TokenLabelled(datasets.Folder(pictures / "train"), output, None)) == 6
    ended = command("make_token_labels", *argv, "--device", "cpu", "--num_workers", 0)
    assert ended.code == 0 and "6 were there" in ended.out and load_json(output / "labels.json") == record


def test_labels_that_exist_are_kept(command: Command, pictures: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model.pth", "deit_nano")
    output = tmp_path / "labels"
    argv = ["--checkpoint", tmp_path / "model.pth", "--data-path", pictures, "--output", output, "--top-k", 2]
    argv += "--num_workers 0 --device cpu --batch-size 3".split()
    assert command("make_token_labels", *argv).code == 0
    first = {file: file.read_bytes() for file in output.glob("*/*.pt")}
    old, gone = sorted(first)[0], sorted(first)[4]
    torch.save(torch.zeros(1), old)
    gone.unlink()
    ended = command("make_token_labels", *argv)
    assert ended.code == 0 and "1 token labels made, 5 were there" in ended.out
    assert torch.equal(torch.load(old, weights_only=True), torch.zeros(1))
    assert gone.read_bytes() == first[gone]
    assert sorted(output.glob("*/*")) == sorted(first)  # no temporary file is left
    assert "0 token labels made, 6 were there" in command("make_token_labels", *argv).out
    ended = command("make_token_labels", *argv, "--size", 12)
    assert ended.code == 2 and "made otherwise" in ended.err and len(ended.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--top-k 3", "--top-k is 3"),
        ("--size 0", "--size: '0' is not a whole number from 1 up"),
        ("--batch-size 0", "--batch-size: '0' is not a whole number from 1 up"),
        ("--img-size 0", "--img-size: '0' is not a whole number from 1 up"),
        ("--model deit_nano", "no published weights: give --checkpoint"),
        ("--model test_unknown --checkpoint {model}", "unknown model 'test_unknown'"),
        ("--model test_vit --checkpoint {model}", "does not fit the model"),
        ("--model deit_nano --checkpoint {absent}", "no checkpoint at"),
        ("--checkpoint {wide}", "does not classify every patch"),
        ("--checkpoint {bare}", "--model"),
        ("--checkpoint {three}", "knows other classes"),
        ("--checkpoint {model} --data-path {tmp}/nothing", "no folder"),
        ("", "no model given"),
    ],
)
def test_bad_input_is_one_line(
    command: Command, pictures: Path, tmp_path: Path, argv: str, message: str
) -> None:
    files = {name: tmp_path / f"{name}.pth" for name in ("model", "absent", "wide", "bare", "three")}
    model = timm.create_model("deit_nano", num_classes=2)
    checkpoint = {"model": model.state_dict(), "model_name": "deit_nano"}
    torch.save(checkpoint, files["model"])
    torch.save(model.state_dict(), files["bare"])
    torch.save(checkpoint | {"class_names": ["c", "a.b"]}, files["three"])  # the same two in another order
    wide = timm.create_model("lf_deit_nano", num_classes=2)
    torch.save({"model": wide.state_dict(), "model_name": "lf_deit_nano"}, files["wide"])
    words = argv.format(**files, tmp=tmp_path).split()
    if words and words[0].startswith(("--top", "--size", "--batch", "--img")):
        words += ["--checkpoint", files["model"]]
    defaults = ["--data-path", pictures, "--output", tmp_path / "labels", "--device", "cpu", "--top-k", 1]
    ended = command("make_token_labels", *defaults, "--num_workers", 0, *words)
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1
    assert message in ended.err
    assert not list((tmp_path / "labels").glob("*/*.pt"))


def test_two_images_with_one_label(command: Command, pictures: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model.pth", "deit_nano")
    Image.new("RGB", (8, 8)).save(pictures / "train" / "c" / "1.y.png")
    argv = ["--checkpoint", tmp_path / "model.pth", "--data-path", pictures, "--output", tmp_path / "labels"]
    ended = command("make_token_labels", *argv, "--top-k", 1, "--device", "cpu")
    assert ended.code == 2 and "1.x.png" in ended.err and "1.y.png" in ended.err


@pytest.mark.parametrize("name", ["test_resnet", "test_byobnet", "test_nfnet"])
@torch.inference_mode()
def test_cells_average_to_the_classifiers_own_answer(name: str) -> None:
    """Where the head is linear after an average over the map, so is the average of the cells' logits."""
    seed_all(6)
    model, images = timm.create_model(name, num_classes=7).eval(), torch.randn(2, 3, 96, 96)
    logits = make_token_labels.cell_logits(model, images)
    assert logits.ndim == 4 and logits.shape[:2] == (2, 7) and logits.shape[2] == logits.shape[3] > 1
    torch.testing.assert_close(logits.mean(dim=(2, 3)), model(images), atol=1e-5, rtol=1e-4)


SWIN = partial(
    timm.create_model,
    "swin_tiny_patch4_window7_224",
    img_size=64,
    depths=(1, 1),
    embed_dim=16,
    num_heads=(1, 2),
    window_size=4,
)


@pytest.mark.parametrize(
    "make",
    [
        SWIN,
        partial(timm.create_model, "test_convnext"),
        partial(timm.create_model, "test_vit", img_size=64, global_pool="avg"),
        partial(timm.create_model, "test_vit", img_size=64, reg_tokens=2),
        partial(timm.create_model, "deit_tiny_distilled_patch16_224", img_size=64, depth=1, embed_dim=24),
    ],
)
@torch.inference_mode()
def test_layouts_of_timm(make: partial) -> None:
    """Cells last or first, class tokens or none, a norm before or after pooling."""
    seed_all(7)
    model, images = make(num_classes=7).eval(), torch.randn(2, 3, 64, 64)
    logits = make_token_labels.cell_logits(model, images)
    features = model.forward_features(images)
    if features.ndim == 4 and make is not SWIN:
        features = features.permute(0, 2, 3, 1)
    if features.ndim == 3:
        patches = features[:, model.num_prefix_tokens :]
        side = int(patches.shape[1] ** 0.5)
        features = patches.unflatten(1, (side, side))
    if "head_dist" in dict(model.named_children()):
        expected = (model.head(features) + model.head_dist(features)) / 2
    elif make.args[0] == "test_convnext":
        expected = model.head.fc(model.head.norm(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    else:
        expected = getattr(model, "fc_norm", nn.Identity())(features)
        expected = model.head.fc(expected) if make is SWIN else model.head(expected)
    torch.testing.assert_close(logits, expected.permute(0, 3, 1, 2), atol=1e-5, rtol=1e-4)


def test_many_classes_are_kept_exact() -> None:
    """Half precision would round class numbers above 2048."""
    largest = make_token_labels.LARGEST_HALF
    numbers = torch.arange(largest + 2)
    assert (numbers.half().long() == numbers).tolist() == [True] * (largest + 1) + [False]


def test_make_labels_keeps_probabilities() -> None:
    seed_all(8)
    logits = 3 * torch.randn(2, 30, 6, 6) - 9  # all below the 0 that classes left out enter with
    label = make_token_labels.make_labels(logits, 6, 4)
    best = logits.softmax(dim=1).topk(4, dim=1)
    assert torch.equal(label[:, 1], best.indices.float())
    targets = token_targets(label, WHOLE.expand(2, -1), 30, 6, smoothing=0)[..., 1:].unflatten(2, (6, 6))
    torch.testing.assert_close(targets.gather(1, best.indices), best.values, atol=1e-5, rtol=1e-4)
    whole = make_token_labels.make_labels(logits, 6, 30)
    torch.testing.assert_close(whole[:, 0], logits.sort(dim=1, descending=True).values)


def test_own_files_and_labels_fit(tmp_path: Path) -> None:
    """One name for one label, however it is made and read."""
    assert make_token_labels.label_path is token_labels.label_path
    utils.write_atomically(tmp_path / "a.pt", partial(torch.save, torch.zeros(2, 1, 3, 3).half()))
    assert load_label(tmp_path / "a.pt").shape == (2, 1, 3, 3)
