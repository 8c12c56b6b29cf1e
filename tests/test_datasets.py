"""Tests of datasets.py: which class number an image gets, and which process sees it how often."""

import json
import logging
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cases import Command
from PIL import Image
from scipy.io import savemat
from torch.utils.data import DataLoader
from torchvision.datasets.folder import make_dataset

import datasets
from datasets import DATA_CONFIG, DataSource, Files, Folder, build_dataset
from loading.classes import class_numbers
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


HIDDEN = (".ipynb_checkpoints/0.png", "a/._0.png", "a/.thumbs/0.png", ".DS_Store.png", "b/.cache/x/0.png")


def test_names_that_begin_with_a_dot_are_no_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "adaptive-vit")
    make_images(tmp_path / "train", "a/0.png", "b/0.png", *HIDDEN)
    train = build_dataset(DataSource("IMNET", tmp_path), "train")
    assert train.classes == ["a", "b"] and labels(train) == [0, 1]
    assert caplog.messages == [f"{tmp_path / 'train'}: left out: 5 hidden"]
    files = Files(tmp_path / "train")
    assert [str(path.relative_to(tmp_path)) for path in files.paths] == ["train/a/0.png", "train/b/0.png"]
    assert len(Files(tmp_path / "train" / "a" / "._0.png")) == 1  # named by itself
    with pytest.raises(ValueError, match="split .val begins with a dot"):
        build_dataset(DataSource("IMNET", tmp_path), ".val")


def test_order_of_the_images_is_torchvisions(tmp_path: Path) -> None:
    make_images(tmp_path, *(f"c/{name}.png" for name in ("b/0", "b-2/0", "b/x/0", "b.d/0", "a", "z", "B/1")))
    assert Folder(tmp_path).samples == make_dataset(str(tmp_path), {"c": 0}, (".png",))


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


def test_a_name_that_stands_for_two_classes_is_refused(tmp_path: Path) -> None:
    make_images(tmp_path, "val/crane/0.png")
    with pytest.raises(ValueError, match="the model has two classes 'crane'"):
        build_dataset(DataSource("IMNET", tmp_path), "val", classes=["crane", "dog", "crane"])
    assert class_numbers("x", ["b", "a"], None) == {"b": 0, "a": 1}


def test_given_classes_hold_for_training_and_an_absent_one_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "adaptive-vit")
    make_images(tmp_path, "train/a/0.png", "train/c/0.png")
    (tmp_path / "train" / "d").mkdir()
    train = build_dataset(DataSource("IMNET", tmp_path), "train", classes=["a", "b", "c", "d"])
    assert labels(train) == [0, 2] and len(train.classes) == 4
    assert caplog.messages == ["2 of 4 classes have no training image: b, d"]
    with pytest.raises(ValueError, match="class 'd', which is not among the model's"):
        build_dataset(DataSource("IMNET", tmp_path), "train", classes=["a", "b", "c"])


def test_resumed_training_refuses_a_renamed_class(
    command: Command, folder: Path, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "train" / "amber").rename(tmp_path / "data" / "train" / "zinc")
    shutil.copytree(trained, tmp_path / "output")
    files = {path: path.read_bytes() for path in (tmp_path / "output").glob("*.pth")}
    flags = ["--data-path", tmp_path / "data", "--epochs", 3, "--device", "cpu", "--num_workers", 0]
    ended = command("main_deit", "--resume", "auto", "--output_dir", tmp_path / "output", *flags)
    assert ended.code == 2 and "class 'zinc', which is not among the model's" in ended.err
    assert files == {path: path.read_bytes() for path in (tmp_path / "output").glob("*.pth")}


def test_cifar_has_the_classes_of_the_model_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cifar(list):
        classes = ["cat", "dog"]

        def __init__(self, root: str, **options):
            super().__init__()

    monkeypatch.setattr(datasets, "CIFAR10", Cifar)
    assert build_dataset(DataSource("CIFAR10", "x"), "val", classes=["cat", "dog"]).classes == Cifar.classes
    with pytest.raises(ValueError, match="not those of Cifar in its order"):
        build_dataset(DataSource("CIFAR10", "x"), "val", classes=["dog", "cat"])
    with pytest.raises(ValueError, match="CIFAR10 has no split 'dev'"):
        build_dataset(DataSource("CIFAR10", "x"), "dev")


@pytest.mark.parametrize(
    ("source", "flag"),
    [
        (DataSource("INAT", ".", use_lmdb=True), "--use-lmdb goes with --data-set IMNET"),
        (DataSource("IMNET", ".", "genus"), "--inat-category goes with --data-set INAT"),
        (DataSource("CIFAR", ".", image_key="img"), "--image-key goes with --data-set wds/NAME or hfds/NAME"),
        (DataSource("IMNET", ".", label_key="fine"), "--label-key goes with"),
        (DataSource("hfds/x", ".", val_labels="f"), "--val-labels goes with --data-set IMNET"),
        (DataSource("IMNET", ".", use_lmdb=True, val_labels="f"), "--val-labels .*not --use-lmdb"),
        (DataSource("IMNET", ".", val_synsets="f"), "--val-synsets goes with --val-labels"),
    ],
)
def test_what_a_data_set_does_not_read_is_refused(source: DataSource, flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        build_dataset(source, "train")


# What is left out


def test_kinds_of_files_that_are_read_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "adaptive-vit")
    names = ("0.PNG", "1.JPEG", "2.Jpg", "3.WEBP", "4.TIF", "5.GIF", "6.gif")
    make_images(tmp_path, *(f"train/a/{name}" for name in names))
    for name in ("7.jfif", "8.JPE"):
        shutil.copy(tmp_path / "train" / "a" / "1.JPEG", tmp_path / "train" / "a" / name)
    for name in ("a/x.heic", "a/y.HEIC", "a/README", "a/z.txt", "a/.z", "classes.csv"):
        (tmp_path / "train" / name).touch()
    data = build_dataset(DataSource("IMNET", tmp_path), "train")
    assert len(data) == 9 and {data[i][0].size for i in range(9)} == {(8, 8)}
    reasons = "2 .heic, 1 beside the class folders, 1 without an ending, 1 .txt, 1 hidden"
    (line,) = caplog.messages
    start, _, told = line.partition(": left out: ")
    assert start == str(tmp_path / "train") and sorted(told.split(", ")) == sorted(reasons.split(", "))
    caplog.clear()
    assert len(Files(tmp_path / "train")) == 9
    assert "2 .heic" in caplog.text and "1 .csv" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"no image below .* \(left out: 1 .txt\)"):
        make_images(tmp_path / "none")
        (tmp_path / "none").mkdir()
        (tmp_path / "none" / "x.txt").touch()
        Files(tmp_path / "none")


def test_class_whose_files_are_all_left_out_is_an_error(tmp_path: Path) -> None:
    make_images(tmp_path, "train/a/0.png", "train/b/.0.png")
    assert Folder(tmp_path / "train").classes == ["a", "b"]  # nothing but hidden files is an empty class
    (tmp_path / "train" / "b" / "0.heic").touch()
    with pytest.raises(FileNotFoundError, match=r"train/b \(left out: 1 hidden, 1 .heic\): expected"):
        Folder(tmp_path / "train")


def test_links_are_followed_alike_and_never_in_circles(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "adaptive-vit")
    make_images(tmp_path, "far/x/0.png", "far/1.png", "tree/a/2.png", "tree/b/3.png")
    for link, target in {
        "tree/c": "far",
        "tree/a/far": "far/x",
        "tree/b/up": "tree",
        "far/x/round": "far",
        "tree/b/self": "tree/b/self",
        "tree/b/4.png": "far/1.png",
    }.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    (tmp_path / "link").symlink_to(tmp_path / "tree")
    for root in ("tree", "link"):
        data, files = Folder(tmp_path / root), Files(tmp_path / root)
        names = ["a/2.png", "a/far/0.png", "b/3.png", "b/4.png", "c/1.png", "c/x/0.png"]
        assert [os.path.relpath(path, tmp_path / root) for path, _ in data.samples] == names
        assert sorted(map(str, files.paths)) == [str(tmp_path / root / name) for name in names]
        assert labels(data) == [0, 0, 1, 1, 2, 2]
    assert all("linked to a folder around it" in line for line in caplog.messages)


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    make_images(tmp_path, "train/a/0.png")
    (tmp_path / "train" / "a" / "1.png").symlink_to(tmp_path / "gone.png")
    for data in (Folder(tmp_path / "train"), Files(tmp_path / "train")):
        with pytest.raises(ValueError, match="cannot read image .*1.png"):
            data[1]
    (tmp_path / "train" / "b").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="train/b is a link that leads nowhere"):
        Folder(tmp_path / "train")


# Validation images without class folders

KIT = [(1, "n03"), (2, "n01"), (3, "n02"), (4, "n99")]  # numbers of the development kit, and classes
TRUTH = ["n01", "n03", "n02", "n03"]  # of the images 1 to 4


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """A data folder whose val is as ImageNet's archive of it: four files, and one hidden."""
    make_images(tmp_path / "data", *(f"train/n0{number}/0.JPEG" for number in (1, 2, 3)))
    names = [f"val/ILSVRC2012_val_{number:08}.JPEG" for number in range(1, 5)]
    return make_images(tmp_path / "data", *names, "val/._x.JPEG")


def write_meta(path: Path) -> None:
    """Writes the fields of meta.mat that matter, and two besides."""
    kind = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "num_children")]
    rows = [[(number, name, f"{name}, the", 3 * (number == 4))] for number, name in KIT]
    savemat(path, {"synsets": np.array(rows, kind)})


def val_labels(root: Path, text: str, classes: list[str] | None = None, synsets: str | None = None) -> list:
    (root / "labels.txt").write_text(text)
    source = DataSource("IMNET", root, val_labels=str(root / "labels.txt"), val_synsets=synsets)
    data = build_dataset(source, "val", classes=classes)
    return [data.classes[label] for label in labels(data)]


def in_order(form: str, order: tuple[int, ...] = (2, 0, 3, 1)) -> str:
    return "".join(form.format(number + 1, TRUTH[number]) for number in order)


@pytest.mark.parametrize(
    "text",
    [
        "ImageId,PredictionString\n" + in_order("ILSVRC2012_val_{:08},{} 85 1 499 272 \n"),
        in_order("ILSVRC2012_val_{0:08},{1} 85 1 499 272 {1} 0 0 9 9\n"),
        in_order("ILSVRC2012_val_{:08}.JPEG {}\n") + "ILSVRC2012_val_00000009.JPEG n98\n",
        in_order("val/ILSVRC2012_val_{:08}.JPEG\t{}\r\n\r\n"),
        "\ufefffile,class\n" + in_order('"ILSVRC2012_val_{:08}.JPEG", "{}"\n'),
        "\n".join(TRUTH),
    ],
    ids=["Kaggle", "two boxes", "words", "tabs", "quotes", "names alone"],
)
def test_forms_of_val_labels(text: str, flat: Path) -> None:
    for classes in (None, ["n03", "n98", "n02", "n01"]):
        assert val_labels(flat, text, classes) == TRUTH
    assert len(build_dataset(DataSource("IMNET", flat, val_labels="unread"), "train")) == 3


def test_numbers_of_the_development_kit_need_its_table(flat: Path, tmp_path: Path) -> None:
    numbers = {name: number for number, name in KIT}
    text = "".join(f"{numbers[name]}\n" for name in TRUTH)
    for classes in (None, ["n01", "n02", "n03"], ["1", "2", "3"]):  # not even where classes are called so
        with pytest.raises(ValueError, match="does not number classes in the order of their names: put"):
            val_labels(flat, text, classes)
    table = tmp_path / "map_clsloc.txt"
    for form in ("{0} {1} a_name of 2\n", "{1} {0} a_name\n", "{0},{1}\n"):
        table.write_text("".join(form.format(*pair) for pair in KIT))
        assert val_labels(flat, text, synsets=str(table)) == TRUTH
    write_meta(flat / "meta.mat")  # beside labels.txt
    assert val_labels(flat, text) == TRUTH
    with pytest.raises(ValueError, match="does not hold the development kit's numbers"):
        val_labels(flat, "\n".join(TRUTH), synsets=str(table))
    for content, message in (
        ("n01 tench\nn02 fish\n", "'n01 tench' is not 'number class' or 'class number'"),
        ("0 n01\n1 n02\n2 n03\n", "starts at the number 0"),
        ("1 n01\n2 n01\n", "a number or a class twice"),
        ("1 n03\n", "does not tell which class the number 2 is"),
    ):
        table.write_text(content)
        with pytest.raises(ValueError, match=message):
            val_labels(flat, text, synsets=str(table))
    (flat / "meta.mat").write_bytes(b"no table")
    with pytest.raises(ValueError, match="is not the meta.mat of ImageNet's development kit"):
        val_labels(flat, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("n01\nn02\nn03\n", "no list of one class name for each of the 4:"),
        (in_order("other_{},{}\n"), "names none of the images, such as .*00000001.JPEG"),
        (in_order("ILSVRC2012_val_{:08}.JPEG,{}\n", (0, 1, 2)), "no class for .*00000004.JPEG"),
        (in_order("ILSVRC2012_val_{:08}.JPEG,{}\n") + "ILSVRC2012_val_00000001,n02", "several classes"),
        (in_order("ILSVRC2012_val_{:08}.JPEG,{}\n") + "ILSVRC2012_val_00000001.JPEG,n02", "several classes"),
        ("ILSVRC2012_val_00000001,n01 1 2 3 4 n02 1 2 3 4", "several classes for ILSVRC2012_val_00000001"),
        ("ILSVRC2012_val_00000001,n01,x", "is not an image and its class"),
        (in_order("ILSVRC2012_val_{:08}.JPEG {}x\n"), "class 'n01x', which is not among the model's"),
        (in_order("ILSVRC2012_val_{0:08}.JPEG {0}\n"), "the number 1, which is none of the model's class"),
        (in_order("ILSVRC2012_val_{0:08}.JPEG {0}.0\n"), "the number 1.0, which is none"),
    ],
)
def test_val_labels_that_do_not_fit(text: str, message: str, flat: Path) -> None:
    with pytest.raises(ValueError, match=message):
        val_labels(flat, text, ["n01", "n02", "n03"])


def test_names_alone_need_a_clear_order(tmp_path: Path) -> None:
    make_images(tmp_path, "val/8.png", "val/9.png", "val/10.png")
    with pytest.raises(ValueError, match="order of theirs is not clear"):
        val_labels(tmp_path, "a\nb\nc\n")
    assert val_labels(tmp_path, "8 a\n9 b\n10 c\n") == ["c", "a", "b"]


def test_numbers_that_are_class_names(flat: Path) -> None:
    text = in_order("ILSVRC2012_val_{0:08}.JPEG {0}\n")
    assert val_labels(flat, text, ["4", "3", "2", "1"]) == ["1", "2", "3", "4"]
    with pytest.raises(ValueError, match="not known in which order"):  # as texts 10 would come before 2
        val_labels(flat, text)


def test_val_folder_without_classes_says_what_is_read(flat: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no class folder in .*val; .*--val-labels FILE: lines 'file"):
        build_dataset(DataSource("IMNET", flat), "val")
    (flat / "val" / "n01").mkdir()
    with pytest.raises(ValueError, match="val has class folders, such as n01: --val-labels is for"):
        val_labels(flat, "n01")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        shutil.rmtree(flat / "val" / "n01")
        build_dataset(DataSource("IMNET", flat, val_labels="nowhere"), "val")


def test_commands_evaluate_a_folder_without_classes(
    command: Command, folder: Path, trained: Path, tmp_path: Path
) -> None:
    """The same accuracy as with class folders."""
    (tmp_path / "flat" / "val").mkdir(parents=True)
    lines = []
    for path in (folder / "val").glob("*/*.png"):
        shutil.copy(path, tmp_path / "flat" / "val" / f"{path.parent.name}_{path.name}")
        lines.append(f"{path.parent.name}_{path.stem},{path.parent.name}\n")
    (tmp_path / "labels.csv").write_text("image,class\n" + "".join(lines))
    shared = ["--resume", trained / "checkpoint.pth", "--device", "cpu", "--num_workers", 0]
    flags = [tmp_path / "flat", "--val-labels", tmp_path / "labels.csv"]
    ended, other = (
        command("main_deit", "--eval", *shared, "--data-path", *data) for data in ([folder], flags)
    )
    assert ended.code == other.code == 0, other.err
    assert [line[9:] for line in ended.err.splitlines()] == [line[9:] for line in other.err.splitlines()]
    results = []
    for name, data in (("a", [folder]), ("b", flags)):
        argv = [*shared, "--eval-mode", 0, "--results", tmp_path / name, "--data-path", *data]
        assert command("dynamic_inference", *argv).code == 0
        results.append(json.loads((tmp_path / name).read_text()))
    assert results[0] == results[1]
    ended = command("visualize", *shared[:4], "--output_dir", tmp_path / "p", "--data-path", *flags)
    assert ended.code == 0, ended.err


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


def test_inaturalist_is_numbered_by_the_models_names(tmp_path: Path) -> None:
    make_inat(tmp_path, 2018, with_kingdom=True)
    source = DataSource("INAT", tmp_path)
    for split, numbers in (("train", [3, 2, 3, 0]), ("val", [0, 3, 2])):
        data = build_dataset(source, split, classes=["dog rose", "x", "rose", "wolf"])
        assert [label for _, label in data.samples] == numbers and len(data.classes) == 4
        with pytest.raises(ValueError, match="class 'rose', which is not among"):
            build_dataset(source, split, classes=["dog rose", "wolf"])


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
