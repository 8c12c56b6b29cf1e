"""Tests of datasets.py: which class number an image gets, and which process sees it how often."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

import datasets
from datasets import DATA_CONFIG, DataSource, Files, Folder, build_dataset
from loading.loaders import EvalLoader, Shard, train_loader


def make_images(root: Path, *names: str) -> Path:
    """Writes an 8 x 8 picture under every name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)
    return root


def labels(data: Folder) -> list[int]:
    return [label for _, label in data.samples]


def seen(loader: DataLoader) -> list[int]:
    return [int(value) for batch in loader for value in batch]


# Folders


def test_folder_numbers_classes_by_sorted_name(tmp_path: Path) -> None:
    make_images(tmp_path, "train/pear/0.png", "train/apple/1.jpg", "train/fig/2.JPEG")
    train = build_dataset(DataSource("IMNET", tmp_path), "train")
    assert train.classes == ["apple", "fig", "pear"]
    assert [(Path(path).name, label) for path, label in train.samples] == [
        ("1.jpg", 0),
        ("2.JPEG", 1),
        ("0.png", 2),
    ]


def test_split_without_a_class_keeps_the_numbers(tmp_path: Path) -> None:
    make_images(tmp_path, "train/a/0.png", "train/b/0.png", "train/c/0.png", "val/c/0.png", "val/a/0.png")
    train = build_dataset(DataSource("IMNET", tmp_path), "train")
    val = build_dataset(DataSource("IMNET", tmp_path), "val", classes=train.classes)
    assert labels(val) == [0, 2]
    assert val.classes == train.classes
    alone = build_dataset(DataSource("IMNET", tmp_path), "val")
    assert labels(alone) == [0, 1]  # nothing given: numbered by itself


def test_given_order_of_classes_holds(tmp_path: Path) -> None:
    make_images(tmp_path, "val/a/0.png", "val/b/0.png")
    val = build_dataset(DataSource("IMNET", tmp_path), "val", classes=["b", "x", "a"])
    assert labels(val) == [2, 0]


def test_unknown_class_folder(tmp_path: Path) -> None:
    make_images(tmp_path, "val/a/0.png", "val/kiwi/0.png")
    with pytest.raises(ValueError, match="kiwi"):
        build_dataset(DataSource("IMNET", tmp_path), "val", classes=["a", "b"])


def test_missing_val_is_found_under_its_other_names(tmp_path: Path) -> None:
    make_images(tmp_path, "test/a/0.png")
    assert len(build_dataset(DataSource("IMNET", tmp_path), "val")) == 1
    make_images(tmp_path, "validation/a/0.png", "validation/a/1.png")
    assert len(build_dataset(DataSource("IMNET", tmp_path), "val")) == 2
    make_images(tmp_path, "val/a/0.png", "val/a/1.png", "val/a/2.png")
    assert len(build_dataset(DataSource("IMNET", tmp_path), "val")) == 3
    with pytest.raises(FileNotFoundError, match="train"):
        build_dataset(DataSource("IMNET", tmp_path), "train")


@pytest.mark.parametrize("inside", ["", "a", "a/notes.txt"])
def test_folder_without_images(inside: str, tmp_path: Path) -> None:
    path = tmp_path / "val" / inside
    if path.suffix:
        path.parent.mkdir(parents=True)
        path.write_text("no image")
    else:
        path.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="val"):
        build_dataset(DataSource("IMNET", tmp_path), "val")


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    make_images(tmp_path, "a/0.png")
    (tmp_path / "a" / "1.png").write_bytes((tmp_path / "a" / "0.png").read_bytes()[:40])
    (tmp_path / "a" / "2.png").write_text("no image")
    data = Folder(tmp_path)
    assert data[0][0].mode == "RGB"
    for index in (1, 2):
        with pytest.raises(ValueError, match=f"{index}.png"):
            data[index]


def test_unknown_data_set() -> None:
    with pytest.raises(ValueError, match="MNIST"):
        build_dataset(DataSource("MNIST", "."), "train")


@pytest.mark.parametrize("name", ["CIFAR", "CIFAR10", "CIFAR100"])
def test_cifar_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        build_dataset(DataSource(name, tmp_path), "train")


# iNaturalist

CATEGORIES = [
    {"id": 3, "name": "rose", "genus": "rosa", "family": "rosaceae", "kingdom": "plants"},
    {"id": 5, "name": "dog rose", "genus": "rosa", "family": "rosaceae", "kingdom": "plants"},
    {"id": 8, "name": "wolf", "genus": "canis", "family": "canidae", "kingdom": "animals"},
]
SPLITS = {"train": [("t0", 8), ("t1", 3), ("t2", 8), ("t3", 5)], "val": [("v0", 5), ("v1", 8), ("v2", 3)]}


def make_inat(root: Path, year: int, with_kingdom: bool) -> Path:
    """A tree of seven pictures in one of the two layouts."""
    kingdom = {entry["id"]: entry["kingdom"] for entry in CATEGORIES}
    for split, entries in SPLITS.items():
        names = [f"train_val{year}/{kingdom[number]}/{number}/{stem}.jpg" for stem, number in entries]
        annotations = [{"image_id": i, "category_id": number} for i, (_, number) in enumerate(entries)]
        content = {"images": [{"file_name": name} for name in names], "annotations": annotations}
        (root / f"{split}{year}.json").write_text(json.dumps(content))
        flat = [f"train_val{year}/{number}/{stem}.jpg" for stem, number in entries]
        make_images(root, *(names if with_kingdom else flat))
    (root / "categories.json").write_text(json.dumps(CATEGORIES))
    return root


@pytest.mark.parametrize("with_kingdom", [True, False])
@pytest.mark.parametrize(("name", "year"), [("INAT", 2018), ("INAT19", 2019)])
def test_inaturalist_classes_follow_the_training_annotations(
    name: str, year: int, with_kingdom: bool, tmp_path: Path
) -> None:
    make_inat(tmp_path, year, with_kingdom)
    train, val = (build_dataset(DataSource(name, tmp_path), split) for split in ("train", "val"))
    assert train.classes == val.classes == ["wolf", "rose", "dog rose"]
    assert [train[i][1] for i in range(len(train))] == [0, 1, 0, 2]
    assert [val[i][1] for i in range(len(val))] == [2, 0, 1]
    assert [path.stem for path, _ in val.samples] == ["v0", "v1", "v2"]
    assert train[0][0].size == (8, 8)


@pytest.mark.parametrize(
    ("category", "classes", "labels"),
    [("genus", ["canis", "rosa"], [1, 0, 1]), ("kingdom", ["animals", "plants"], [1, 0, 1])],
)
def test_inaturalist_levels(category: str, classes: list[str], labels: list[int], tmp_path: Path) -> None:
    make_inat(tmp_path, 2018, with_kingdom=True)
    val = build_dataset(DataSource("INAT", tmp_path, category), "val")
    assert val.classes == classes
    assert [label for _, label in val.samples] == labels


def test_inaturalist_that_is_not_there(tmp_path: Path) -> None:
    make_inat(tmp_path, 2018, with_kingdom=True)
    with pytest.raises(FileNotFoundError, match="train2019.json"):
        build_dataset(DataSource("INAT19", tmp_path), "train")
    (tmp_path / "categories.json").unlink()
    with pytest.raises(FileNotFoundError, match="categories.json"):
        build_dataset(DataSource("INAT", tmp_path), "val")


# Loaders


@pytest.mark.parametrize(("size", "world_size"), [(7, 1), (7, 2), (10, 3), (13, 4), (2, 5), (0, 2)])
def test_shards_cover_every_index_once(size: int, world_size: int) -> None:
    shards = [Shard(list(range(size)), rank, world_size) for rank in range(world_size)]
    assert sorted(value for shard in shards for value in shard) == list(range(size))
    assert [shard.total for shard in shards] == [size] * world_size
    together = [None] * size
    for rank, shard in enumerate(shards):
        together[rank::world_size] = list(shard)  # how predictions are put together again
    assert together == list(range(size))


def test_evaluation_keeps_order_and_last_batch() -> None:
    loader = EvalLoader(Shard(list(range(7))), 3)
    assert [batch.tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5], [6]]
    assert seen(EvalLoader(Shard(list(range(7)), 1, 3), 3)) == [1, 4]
    assert seen(EvalLoader(Shard(list(range(2)), 4, 5), 3)) == []


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_sees_every_image_once_in_a_new_order_each_epoch(world_size: int) -> None:
    orders = []
    for epoch in range(2):
        loaders = [
            train_loader(list(range(12)), 2, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        orders.append([seen(loader) for loader in loaders])
        assert sorted(value for part in orders[-1] for value in part) == list(range(12))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("size", [12, 100, 300])
def test_repeats_give_every_process_a_copy(size: int) -> None:
    loaders = [train_loader(list(range(size)), 1, repeats=3, rank=r, world_size=3) for r in range(3)]
    parts = [seen(loader) for loader in loaders]
    assert parts[0] == parts[1] == parts[2]  # three processes, three copies: the same images at one time
    assert len(set(parts[0])) == len(parts[0])  # and no process sees an image twice
    per_epoch = -(-size // 3) if size < 256 else 256 // 3  # the samples of an epoch, shared out
    assert len(parts[0]) == per_epoch


def test_repeats_on_two_processes_split_the_copies() -> None:
    parts = [Counter(seen(train_loader(list(range(20)), 1, repeats=3, rank=r, world_size=2))) for r in (0, 1)]
    assert sum(parts[0].values()) == sum(parts[1].values()) == 10
    whole = [image for image, count in (parts[0] + parts[1]).items() if count == 3]
    assert len(whole) == 6  # 20 samples are six images three times and one twice
    assert all({parts[0][image], parts[1][image]} == {1, 2} for image in whole)


def test_repeats_on_one_process_keep_the_epoch_length() -> None:
    counts = Counter(seen(train_loader(list(range(30)), 1, repeats=3)))
    assert sorted(counts.values()) == [3] * 10


@pytest.mark.parametrize("repeats", [1, 3])
def test_training_set_smaller_than_a_batch(repeats: int) -> None:
    for count, world_size, sizes in ((9, 1, [8]), (16, 2, [8]), (10, 1, [10]), (1, 1, [1])):
        loader = train_loader(list(range(count)), 10, repeats=repeats, world_size=world_size)
        assert [len(batch) for batch in loader] == sizes


def test_last_training_batch_is_full() -> None:
    assert [len(batch) for batch in train_loader(list(range(11)), 4)] == [4, 4]


# Unlabelled pictures


def test_files_are_found_below_a_folder_and_alone(tmp_path: Path) -> None:
    make_images(tmp_path, "b/0.png", "a.JPG", "c/d/1.webp")
    (tmp_path / "notes.txt").write_text("no image")
    files = Files(tmp_path)
    assert [path.name for path in files.paths] == ["a.JPG", "0.png", "1.webp"]
    assert [files[i][1] for i in range(3)] == [0, 1, 2]
    assert len(Files(tmp_path / "a.JPG")) == 1


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Files(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no image below"):
        Files(tmp_path)


@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (160, 160), (57, 301)])
def test_box_is_mapped_back_to_the_picture(size: tuple[int, int], crop_pct: float, tmp_path: Path) -> None:
    """A white rectangle, located in the model input, comes back to where it was painted."""
    width, height = size
    centre, half = (width // 2 + 5, height // 2 - 7), min(size) // 5
    painted = [centre[0] - half, centre[1] - half // 2, centre[0] + half, centre[1] + half // 2]
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[painted[1] : painted[3], painted[0] : painted[2]] = 255
    Image.fromarray(pixels).save(tmp_path / "0.png")
    config = DATA_CONFIG | {"mean": [0.0] * 3, "std": [1.0] * 3, "crop_pct": crop_pct}
    files = Files(tmp_path, datasets.eval_transform(112, config))
    image, index = files[0]
    assert image.shape == (3, 112, 112)
    rows, columns = (np.flatnonzero((image[0] > 0.5).any(dim=axis).numpy()) for axis in (1, 0))
    box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    back = files.in_original(index, [int(value) for value in box], 112, config)
    assert np.abs(np.array(back) - painted).max() <= 2


def test_box_stays_inside_the_picture(tmp_path: Path) -> None:
    make_images(tmp_path, "0.png")  # 8 x 8
    config = DATA_CONFIG | {"crop_pct": 1.0}
    assert Files(tmp_path).in_original(0, [-9, 0, 28, 99], 56, config) == [0, 0, 4, 8]
