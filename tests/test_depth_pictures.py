"""Pictures of token depths: what is drawn where, which image stands for its class, and the demo command."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from cases import Command
from matplotlib import colormaps
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

import datasets
import models  # noqa: F401  (registers the models)
from checkpointing.format import load_checkpoint, save_checkpoint
from inference.pictures import (
    BAR,
    GAP,
    HEAD,
    Explanation,
    contact_sheet,
    depth_map,
    draw,
    draw_classes,
    explain,
    headline,
    mask,
    most_varied,
)
from loading import loaders
from models import Adaptive, Picture, StageOutput
from models.weights import published_name

PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


class Scripted(Adaptive):
    """Says that a patch went through as many blocks as its first red value times L."""

    def __init__(self, patch_size: int, blocks: int):
        super().__init__()
        self.patch_size, self.blocks = patch_size, blocks
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def stage(self, k: int, images: Tensor, prev: dict[str, Tensor]) -> StageOutput:
        red = images[:, 0, :: self.patch_size, :: self.patch_size].flatten(1)  # [B,P]
        depth = (red * self.blocks).round().long()
        logits = torch.tensor([0.0, math.log(3)]).expand(len(images), -1)
        return StageOutput(logits, {"depth": depth})

    def picture(self, info: dict[str, Tensor]) -> Picture:
        return Picture(depth=info["depth"], blocks=self.blocks)


def painted(depth: np.ndarray, blocks: int, patch_size: int) -> Tensor:
    """An image [3,S,S] from which `Scripted` reads these depths [g,g]."""
    red = torch.from_numpy(depth / blocks).float()
    return red.repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1).expand(3, -1, -1)


def some_depths(grid: int, low: int, high: int, seed: int = 0) -> np.ndarray:
    depths = np.random.default_rng(seed).integers(low, high + 1, (grid, grid))
    depths.flat[:2] = low, high
    return depths


def explained(depth: np.ndarray, blocks: int, patch_size: int) -> Explanation:
    data = TensorDataset(painted(depth, blocks, patch_size)[None], torch.tensor([0]))
    (item,) = explain(Scripted(patch_size, blocks), data, [0], PLAIN, [])
    return item


def pixels(picture: Tensor) -> np.ndarray:
    """A picture as [height,width,3]."""
    return picture.movedim(0, -1).numpy()


def centres(panel: np.ndarray, side: int, grid: int) -> np.ndarray:
    """Colours [g,g,3] in the middle of the cells of a map `side` pixels wide."""
    middle = ((np.arange(grid) + 0.5) * side / grid).astype(int)
    return panel[middle[:, None], middle]


def colours(depth: np.ndarray, blocks: int) -> np.ndarray:
    return np.round(255 * colormaps["hot"]((depth - 1) / (blocks - 1))[..., :3])


@pytest.mark.parametrize("grid, patch_size, blocks", [(4, 14, 6), (14, 16, 12), (3, 100, 4)])
def test_every_patch_has_its_depth_in_its_place(grid: int, patch_size: int, blocks: int) -> None:
    depth = some_depths(grid, 1, blocks)
    item = explained(depth, blocks, patch_size)
    assert np.array_equal(item.depth, depth) and item.blocks == blocks
    image, size = pixels(draw(item, ("full",))), grid * patch_size
    side = size * max(1, 224 // size)
    field = image[HEAD:, side + GAP : 2 * side + GAP]
    np.testing.assert_allclose(centres(field, side, grid), colours(depth, blocks), atol=1)
    brightness = np.round(255 * depth / blocks)[..., None].repeat(3, -1)
    assert np.array_equal(centres(image[HEAD:, :side], side, grid), brightness)
    assert image.shape == (HEAD + side, 2 * side + 2 * GAP + BAR, 3)


def test_the_colour_scale_does_not_follow_the_depths_of_a_picture() -> None:
    shallow, deep = some_depths(8, 2, 4, seed=1), some_depths(8, 4, 12, seed=2)
    maps = [pixels(depth_map(torch.from_numpy(depth), 12, 224)) for depth in (shallow, deep)]
    fours = [centres(one, 224, 8)[depth == 4] for one, depth in zip(maps, (shallow, deep), strict=True)]
    assert (fours[0] == fours[0][0]).all() and (fours[1] == fours[0][0]).all()
    bars = [one[:, 224 + GAP :] for one in maps]
    assert np.array_equal(*bars)
    steps = bars[0][np.arange(12) * 224 // 12 + 9, BAR // 6]  # from the deepest down
    np.testing.assert_allclose(steps, colours(np.arange(12, 0, -1), 12), atol=1)
    assert (np.diff(steps.astype(int).sum(axis=-1)) < 0).all() and steps[0].tolist() == [255, 255, 255]


def test_headline_tells_class_confidence_and_mean_depth() -> None:
    item = explained(np.array([[1, 2], [4, 4]]), 4, 8)
    assert headline(item, ("full",), ["cat", "dog"]) == "full: dog 0.75, mean depth 2.8  (true: cat)"
    assert headline(item._replace(label=None), ("full",)) == "full: 1 0.75, mean depth 2.8"
    assert "depth" not in headline(item._replace(depth=None), ("full",))


def test_one_block_has_a_picture() -> None:
    assert draw(explained(np.ones((2, 2), int), 1, 8), ("full",)).shape[1] == HEAD + 224


def test_patches_that_left_are_faded_and_missing_drops_leave_their_place() -> None:
    kept = [mask(torch.tensor([[0, 3, -1]]), 2)[0], mask(torch.tensor([[3, -1]]), 2)[0]]
    assert [m.flatten().tolist() for m in kept] == [[True, False, False, True], [False, False, False, True]]
    item = explained(np.array([[1, 2], [3, 4]]), 4, 112)._replace(depth=None, kept=kept)
    image = pixels(draw(item, ("full",), drops=3))
    assert image.shape == (HEAD + 224, 4 * 224 + 3 * GAP, 3)
    panels = [image[HEAD:, at * (224 + GAP) :][:, :224] for at in range(4)]
    for panel, staying in zip(panels[1:3], kept, strict=True):
        shown, faded = centres(panel, 224, 2)[staying], centres(panel, 224, 2)[~staying]
        assert np.array_equal(shown, centres(panels[0], 224, 2)[staying])
        np.testing.assert_allclose(faded, 0.3 * centres(panels[0], 224, 2)[~staying] + 0.7 * 255, atol=1)
    assert (panels[3] == 235).all()


def test_the_region_is_framed() -> None:
    item = explained(np.ones((2, 2), int), 4, 28)._replace(depth=None, region=torch.tensor([0, 28, 28, 56]))
    image = pixels(draw(item, ("full",)))[HEAD:]  # enlarged four times
    framed = (image == (255, 210, 0)).all(axis=-1)
    rows, columns = np.nonzero(framed)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (0, 112, 112, 224)
    assert framed.sum() == 112**2 - 106**2


def test_one_picture_is_its_own_sheet() -> None:
    picture = draw(explained(np.ones((2, 2), int), 4, 28), ("full",))
    assert torch.equal(contact_sheet([picture]), picture)
    height, width = picture.shape[1:]
    assert contact_sheet([picture] * 3).shape == (3, 2 * height + 12, 2 * width + 12)


@pytest.fixture(scope="module")
def drawn_set() -> tuple[list[np.ndarray], list[int]]:
    """Depths [8,8] of 25 images of three classes, which come in no order."""
    generator = np.random.default_rng(3)
    spans = [sorted(generator.integers(1, 13, 2)) for _ in range(25)]
    depths = [some_depths(8, low, high, seed) for seed, (low, high) in enumerate(spans)]
    return depths, generator.integers(0, 3, 25).tolist()


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_image_of_a_class_is_the_most_varied_of_all(drawn_set: tuple, batch_size: int) -> None:
    depths, labels = drawn_set
    data = TensorDataset(torch.stack([painted(depth, 12, 4) for depth in depths]), torch.tensor(labels))
    items = most_varied(Scripted(4, 12), loaders.EvalLoader(loaders.Shard(data), batch_size), PLAIN, [])
    assert [item.label for item in items] == [0, 1, 2]
    for item in items:
        own = [depth for depth, label in zip(depths, labels, strict=True) if label == item.label]
        assert np.array_equal(item.depth, max(own, key=lambda depth: depth.std()))
        assert np.array_equal(item.image[0, ::4, ::4], np.round(255 * item.depth / 12))
        for part in (item.image, item.depth):  # or the batch it came in would stay
            assert part.untyped_storage().nbytes() == part.nbytes


def test_of_equal_images_the_first_is_taken() -> None:
    depth = some_depths(4, 1, 6)
    images = torch.stack([painted(one, 6, 4) for one in (depth, 7 - depth)])
    data = TensorDataset(images, torch.tensor([5, 5]))
    (item,) = most_varied(Scripted(4, 6), loaders.EvalLoader(loaders.Shard(data), 2), PLAIN, [])
    assert np.array_equal(item.depth, depth)


def test_many_classes_make_a_sheet_about_square(tmp_path: Path) -> None:
    images = torch.stack([painted(some_depths(2, 1, 4, seed), 4, 112) for seed in range(16)])
    loader = loaders.EvalLoader(loaders.Shard(TensorDataset(images, torch.arange(16))), 16)
    draw_classes(Scripted(112, 4), loader, PLAIN, [], tmp_path, [f"number {c}" for c in range(16)])
    with (
        Image.open(tmp_path / "contact_sheet.png") as page,
        Image.open(tmp_path / "class7_combined.png") as one,
    ):
        assert page.size == (4 * one.width + 3 * 12, 4 * one.height + 3 * 12)
    assert len(list(tmp_path.iterdir())) == 3 * 16 + 1


# Commands


@pytest.fixture(scope="module")
def halting(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of avit_deit_nano whose bright patches halt early. Not to be written to."""
    torch.manual_seed(0)
    kwargs = dict(num_classes=4, gate_scale=4.0, gate_center=6.0)
    model = timm.create_model("avit_deit_nano", **kwargs)
    with torch.no_grad():
        model.pos_embed.normal_(std=0.3)
        model.patch_embed.proj.weight[0].fill_(0.05)
        for block in model.blocks:
            block.mlp.fc2.bias[0] = 0.6
    path = tmp_path_factory.mktemp("halting") / "checkpoint.pth"
    checkpoint = {"model": model.state_dict(), "model_name": "avit_deit_nano", "model_kwargs": kwargs}
    save_checkpoint(checkpoint | {"class_names": sorted(p.name for p in (folder / "val").iterdir())}, path)
    return path


@pytest.fixture(scope="module")
def expected(folder: Path, halting: Path) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Pixels [56,56,3] and depths [14,14] of each class's image, by brute force on the masked path."""
    saved = load_checkpoint(halting)
    model = timm.create_model(saved["model_name"], **saved["model_kwargs"])
    model.load_state_dict(saved["model"])
    data = datasets.build_dataset(
        datasets.DataSource("IMNET", folder), "val", datasets.eval_transform(56, datasets.DATA_CONFIG)
    )
    images, labels = (
        torch.stack(column) for column in zip(*((x, torch.tensor(y)) for x, y in data), strict=True)
    )
    depth = model.train()(images)[0].info["depth"][:, 1:].double()
    assert len(depth.unique()) == 4  # all that there are
    spread, chosen = depth.std(dim=1, correction=0), {}
    for c in range(4):
        row = torch.where(labels == c, spread, -1.0).argmax()
        image = images[row].movedim(0, -1) * torch.tensor(datasets.DATA_CONFIG["std"])
        image = 255 * (image + torch.tensor(datasets.DATA_CONFIG["mean"]))
        chosen[c] = image.round().byte().numpy(), depth[row].long().view(14, 14).numpy()
    return chosen


def check_pictures(output: Path, expected: dict[int, tuple[np.ndarray, np.ndarray]]) -> None:
    """The folder holds the pictures by class and nothing else, each of the expected image."""
    names = {f"class{c}_{what}.png" for c in expected for what in ("ref", "token_depth", "combined")}
    assert {path.name for path in output.iterdir()} == names | {"contact_sheet.png"}
    for c, (image, depth) in expected.items():
        drawn = {}
        for what in ("ref", "token_depth", "combined"):
            with Image.open(output / f"class{c}_{what}.png") as file:
                drawn[what] = np.asarray(file)
        assert np.array_equal(drawn["ref"], image.repeat(4, 0).repeat(4, 1))
        np.testing.assert_allclose(
            centres(drawn["token_depth"], 224, 14), colours(depth, 4), atol=1, err_msg=f"class {c}"
        )
        gap = np.full((224, GAP, 3), 255, np.uint8)
        both = np.concatenate([drawn["ref"], gap, drawn["token_depth"]], axis=1)
        assert np.array_equal(drawn["combined"][HEAD:], both)
        assert (drawn["combined"][:HEAD] != 255).any()


def test_per_class_draws_the_most_varied_image(
    command: Command, folder: Path, halting: Path, expected: dict, tmp_path: Path
) -> None:
    ended = command(
        "visualize", "--resume", halting, "--data-path", folder, "--per-class", "--batch-size", 7,
        "--output_dir", tmp_path / "new", "--num_workers", 0, "--device", "cpu",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    check_pictures(tmp_path / "new", expected)


def test_pictures_of_single_images_show_depths(
    command: Command, folder: Path, halting: Path, tmp_path: Path
) -> None:
    argv = ["--resume", halting, "--images", folder / "val" / "blue", "--output_dir", tmp_path]
    assert command("visualize", *argv, "--device", "cpu").code == 0
    widths = set()
    for path in tmp_path.glob("*_full_index*.png"):
        with Image.open(path) as image:
            widths.add(image.width)
    (width,) = widths
    assert width > 2 * 224


def demo(command: Command, folder: Path, *argv: object):
    fixed = ["--data-path", folder, "--num_workers", 0, "--device", "cpu", "--batch-size", 5]
    return command("main_deit", "--demo", *fixed, *argv)


def test_demo_draws_by_class_where_the_original_does(
    command: Command,
    folder: Path,
    halting: Path,
    expected: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = demo(command, folder, "--finetune", halting)
    assert ended.code == 0, ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["token_act_visualization"]
    check_pictures(tmp_path / "token_act_visualization", expected)


def test_demo_takes_the_model_from_the_name_of_the_file(
    command: Command, folder: Path, tmp_path: Path
) -> None:
    model = timm.create_model("avit_deit_tiny", num_classes=4, depth=1, img_size=32)
    torch.save({"model": model.state_dict()}, tmp_path / "visualization-tiny.pth")
    shutil.copy(tmp_path / "visualization-tiny.pth", tmp_path / "weights.pth")
    sizes = ["--input-size", 32, "--model-kwargs", "depth=1", "--output_dir", tmp_path / "out"]
    ended = demo(command, folder, "--finetune", tmp_path / "visualization-tiny.pth", *sizes)
    assert ended.code == 0, ended.err
    assert len(list((tmp_path / "out").glob("class*.png"))) == 12
    ended = demo(command, folder, "--finetune", tmp_path / "weights.pth", *sizes)
    assert ended.code == 2 and "--model" in ended.err
    ended = demo(command, folder, "--finetune", tmp_path / "weights.pth", "--model", "avit_deit_tiny", *sizes)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    "path, name",
    [
        ("tiny-10-30.pth", "avit_deit_tiny"),
        ("weights/small-10-75.pth", "avit_deit_small"),
        ("visualization-tiny.pth", "avit_deit_tiny"),
        ("tiny/checkpoint.pth", None),
    ],
)
def test_published_names_tell_the_model(path: str, name: str | None) -> None:
    assert published_name(path) == name


def test_demo_loads_strictly(command: Command, folder: Path, halting: Path, tmp_path: Path) -> None:
    saved = load_checkpoint(halting)
    torch.save(saved | {"model": saved["model"] | {"extra": torch.zeros(1)}}, tmp_path / "more.pth")
    ended = demo(command, folder, "--finetune", tmp_path / "more.pth", "--output_dir", tmp_path / "out")
    assert ended.code == 2 and "extra" in ended.err
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize(
    "name, argv, said",
    [
        ("visualize", "--per-class --resume {halting}", "--data-path"),
        ("visualize", "--per-class --resume {halting} --images {folder}/val/blue", "--data-path"),
        (
            "visualize",
            "--per-class --resume {sharp} --data-path {folder} --num_workers 0",
            "LFViT has no token depths",
        ),
        ("main_deit", "--demo --data-path {folder}", "--finetune"),
        ("main_deit", "--demo --data-path {folder} --finetune nowhere.pth", "nowhere.pth"),
        (
            "main_deit",
            "--demo --data-path {folder} --finetune {sharp} --num_workers 0",
            "LFViT has no token depths",
        ),
    ],
)
def test_wrong_use_is_one_line_and_draws_nothing(
    name: str,
    argv: str,
    said: str,
    command: Command,
    folder: Path,
    halting: Path,
    sharp: Path,
    tmp_path: Path,
) -> None:
    argv = argv.format(folder=folder, halting=halting, sharp=sharp).split()
    ended = command(name, *argv, "--device", "cpu", "--output_dir", tmp_path / "out")
    assert ended.code == 2 and said in ended.err and "Traceback" not in ended.err, ended
    assert ended.err.count("error: ") == 1 and said in ended.err.splitlines()[-1]
    assert not list(tmp_path.rglob("*.png"))
