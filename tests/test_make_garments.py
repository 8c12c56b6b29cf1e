"""Tests of scripts/make_garments.py and study_set.py, on a small source of noise in Fashion-MNIST's files."""

import csv
import gzip
import hashlib
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torchvision
from cases import contents, read_boxes
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import _image_set
import make_garments
import study_set

from utils import InputError

COUNTS = {"train": 60, "val": 20, "test": 20}
FEW = {"train": 10, "val": 0, "test": 0}
TRAINING, TEST = 240, 30  # images of the small source; the last 20 of training are for val


def run(output: Path, *arguments: str, **counts: int) -> int:
    """Runs the command for a small set in one process and returns its exit code."""
    options = [f"--{split}={count}" for split, count in (COUNTS | counts).items()]
    try:
        return make_garments.main([f"--output={output}", "--workers=1", *options, *arguments])
    except SystemExit as end:
        return end.code


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files like Fashion-MNIST's; image i is of class i % 10."""
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for part, count in (("train", TRAINING), ("t10k", TEST)):
        images = rng.integers(100, 256, size=(count, 28, 28), dtype=np.uint8)
        labels = np.uint8(np.arange(count) % 10)
        for name, array in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
            header = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
            (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_source(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The small source's checksums, and no package of Debian's on this machine."""
    digests = {
        name: hashlib.sha256(gzip.decompress((source / name).read_bytes())).hexdigest()
        for name in make_garments.CHECKSUMS
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_garments, "CHECKSUMS", digests)
        patch.setattr(make_garments, "DEBIAN", tmp_path_factory.mktemp("nothing"))
        yield


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set from the small source, made once by one worker."""
    output = tmp_path_factory.mktemp("made") / "garments"
    assert run(output, f"--source={source}") == 0
    return output


def test_the_same_arguments_give_the_same_bytes(made: Path, source: Path, tmp_path: Path) -> None:
    """Neither the number of processes nor that of images changes an image; the seed does."""
    assert run(tmp_path / "two", f"--source={source}", "--workers=2") == 0
    assert contents(tmp_path / "two") == contents(made)
    assert run(tmp_path / "other", f"--source={source}", "--seed=1", train=10, val=30, test=0) == 0
    assert run(tmp_path / "more", f"--source={source}", train=10, val=30, test=0) == 0
    images, more, other = (
        {name: data for name, data in contents(root).items() if name.startswith("val/")}
        for root in (made, tmp_path / "more", tmp_path / "other")
    )
    assert len(images) == 20 and len(more) == 30 and images.items() <= more.items()
    assert more.keys() == other.keys() and all(other[name] != data for name, data in more.items())


def test_rows_files_and_sources_agree(made: Path) -> None:
    rows = read_boxes(made)
    assert sorted(row["file"] for row in rows) == sorted(
        name for name in contents(made) if name.endswith(".jpg")
    )
    assert Counter((row["file"].split("/")[0], row["label"]) for row in rows) == {
        (split, str(label)): count // 10 for split, count in COUNTS.items() for label in range(10)
    }
    own = {"train": range(220), "val": range(220, 240), "test": range(240, 270)}
    for row in rows:
        split, folder, _ = row["file"].split("/")
        assert folder == f"{row['label']}_{make_garments.CLASSES[int(row['label'])]}"
        assert int(row["source"]) in own[split] and int(row["source"]) % 10 == int(row["label"])
        left, top, right, bottom = (float(row[side]) for side in ("left", "top", "right", "bottom"))
        assert 0 <= left and 0 <= top and right <= 112 and bottom <= 112
        assert 27.99 < right - left < 56.01 and right - left == pytest.approx(bottom - top, abs=0.002)
    assert len({row["source"] for row in rows}) == len(rows)  # nothing is shown twice while there is more


@pytest.mark.parametrize("sides", [(14, 20), (28, 56)])
def test_the_box_holds_the_garment(
    source: Path, sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A white garment without photograph and fragments: what is bright fills the box, up to a rim."""
    monkeypatch.setattr(make_garments, "draw_fragment", lambda *_: np.zeros((10, 10), np.uint8))
    sources = make_garments.load_sources(source, "train", 112, False)
    white = sources._replace(
        garments=np.full((1, 28, 28), 255, np.uint8), photos=[np.zeros((200, 200, 1), np.float32)]
    )
    for seed in range(40):
        rng = np.random.default_rng(seed)
        image, box = make_garments.draw_image(rng, white, 0, make_garments.Look(112, sides, False))
        bright = image[..., 0] > 128
        y, x = np.argwhere(bright).mean(axis=0) + 0.5
        assert (x, y) == pytest.approx((box.left + box.side / 2, box.top + box.side / 2), abs=0.5)
        assert -1 < bright.sum() ** 0.5 - box.side < box.side / 14  # half a px of the garment's 28, each side


def test_grey_and_colour_and_the_larger_form(made: Path, source: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "large", f"--source={source}", "--size=224", "--colour", **FEW) == 0
    assert run(tmp_path / "large_grey", f"--source={source}", "--size=224", **FEW) == 0
    small = {row["file"]: row for row in read_boxes(made)}
    for row in read_boxes(tmp_path / "large_grey"):
        for side in ("left", "top", "right", "bottom"):
            assert float(row[side]) == pytest.approx(2 * float(small[row["file"]][side]), abs=0.002)
        modes = {}
        for root in (made, tmp_path / "large_grey", tmp_path / "large"):
            with Image.open(root / row["file"]) as image:
                modes[root.name] = (image.mode, image.size, image.format)
        assert modes == {
            "garments": ("L", (112, 112), "JPEG"),
            "large_grey": ("L", (224, 224), "JPEG"),
            "large": ("RGB", (224, 224), "JPEG"),
        }


def test_photographs_of_the_splits_are_their_own(source: Path) -> None:
    widths = {
        split: [photo.shape for photo in make_garments.load_sources(source, split, 112, colour=True).photos]
        for split in ("train", "val", "test")
    }
    assert widths == {split: [(427, w, 3)] * 2 for split, w in (("train", 320), ("val", 160), ("test", 160))}
    columns = [list(range(640))[part] for part in _image_set.COLUMNS.values()]
    assert sorted(sum(columns, [])) == list(range(640))


def test_a_made_set_is_not_made_again(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It then needs no source; other arguments are refused."""
    before = {path: path.stat().st_mtime_ns for path in [made, *made.rglob("*")]}
    capsys.readouterr()
    assert run(made) == 0
    assert capsys.readouterr().out.startswith("already there")
    for other in ("--colour", "--sides=14 28", "--seed=1"):
        assert run(made, *other.replace("=", " ").split()) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in [made, *made.rglob("*")]} == before
    attribution = (made / "ATTRIBUTION.txt").read_text()
    assert all(words in attribution for words in ("Zalando", "MIT License", "CC BY 2.0", "danielbuechele"))


# Where the source comes from


def test_the_package_comes_before_a_download(
    source: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_garments, "DEBIAN", source)
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", None)
    assert run(tmp_path / "again", **FEW) == 0
    assert read_boxes(tmp_path / "again")[0] == read_boxes(made)[0]


def test_download_is_kept_beside_the_set(
    source: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download(root: str, download: bool) -> None:
        calls.append(root)
        folder = Path(root, "FashionMNIST", "raw")
        folder.mkdir(parents=True)
        for name, data in contents(source).items():
            (folder / name).write_bytes(data)

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", download)
    assert run(tmp_path / "again", **FEW) == 0
    assert run(tmp_path / "other", "--seed=1", **FEW) == 0
    assert calls == [str(tmp_path / "fashion-mnist")]
    assert read_boxes(tmp_path / "again")[0] == read_boxes(made)[0]


def test_no_source_is_one_line_with_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(*_: object, **__: object) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nno network\n")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", download)
    assert run(tmp_path / "garments") == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert all(way in message for way in ("dataset-fashion-mnist", "--source", "torchvision"))
    assert run(tmp_path / "garments", f"--source={tmp_path}") == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and f"--source {tmp_path} lacks" in message
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut off", "other content", "no archive"])
def test_a_damaged_file_is_named(
    damage: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = contents(source)
    name = "t10k-images-idx3-ubyte.gz"
    other = bytearray(gzip.decompress(files[name]))
    other[100] ^= 1
    files[name] = {
        "cut off": files[name][:-100],
        "other content": gzip.compress(bytes(other)),
        "no archive": b"<html>",
    }[damage]
    folder = tmp_path / "source"
    folder.mkdir()
    for file, data in files.items():
        (folder / file).write_bytes(data)
    assert run(tmp_path / "garments", f"--source={folder}") == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and str(folder / name) in message and "damaged" in message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("bad", ["--size=100", "--sides 56 28", "--sides 28 120", "--sides 1 28", "--val=-1"])
def test_bad_arguments(bad: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "garments", *bad.split()) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and bad.replace("=", " ").split()[0] in message
    assert not any(tmp_path.iterdir())


# The study


def tell(root: Path, rng: np.random.Generator, telling: str) -> None:
    """Writes a set of 56-px images whose class only the brightness tells, or only the object's detail."""
    (root / "train").mkdir(parents=True)
    (root / "val").mkdir()
    with open(root / "boxes.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "label", "left", "top", "right", "bottom", "source"])
        for number in range(400):
            label = number % 2
            canvas = np.full((56, 56), 120.0)
            left, top = rng.integers(2, 24, size=2)
            if telling == "brightness":
                canvas += 40 * label
            else:  # columns, or rows, one px wide, faded in: grey from afar
                stripes = 110 * (-1) ** np.arange(28) * np.outer(np.hanning(28), np.hanning(28))
                canvas[top : top + 28, left : left + 28] += stripes if label else stripes.T
            name = f"{'train' if number < 300 else 'val'}/{number}.png"
            Image.fromarray(np.uint8(canvas + rng.uniform(-9, 9, canvas.shape))).save(root / name)
            table.writerow([name, label, left, top, left + 28, top + 28, 0])


@pytest.mark.parametrize("telling", ["brightness", "detail"])
def test_study_tells_a_shortcut_and_detail(
    telling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tell(tmp_path / "set", np.random.default_rng(0), telling)
    study_set.main([str(tmp_path / "set"), f"--output={tmp_path / 'study.md'}"])
    text = (tmp_path / "study.md").read_text()
    assert capsys.readouterr().out == text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    values = {row[0]: float(row[1].split()[0]) for row in rows if len(row) > 1 and "±" in row[1]}
    assert values["nothing (the most frequent class)"] == 50
    assert abs(values["the object's size"] - 50) < 20 and abs(values["the object's place"] - 50) < 20
    if telling == "brightness":
        assert values["mean brightness"] == 100 and abs(values["lost at half the side"]) < 10
    else:
        assert values["whole"] > 95 and values["lost at half the side"] > 30
        assert abs(values["all pixels of the image at 14 x 14"] - 50) < 20
    assert "300 images to learn from, 100 to measure" in text


def test_study_reads_a_set_with_colour_in_one_mode(tmp_path: Path) -> None:
    """An image whose channels have the same range is no grey one."""
    pixels = np.random.default_rng(0).integers(256, size=(56, 56, 3), dtype=np.uint8)
    pixels[0, :2] = [[0], [255]]
    rows = []
    for name, colours in (
        ("one.png", pixels),
        ("two.png", pixels // [[[1, 2, 3]]]),
        ("grey.png", pixels[..., :1]),
    ):
        Image.fromarray(np.uint8(np.broadcast_to(colours, pixels.shape))).save(tmp_path / name)
        rows.append({"file": name, "label": "0", "left": "0", "top": "0", "right": "16", "bottom": "16"})
    assert [study_set.mode_of(tmp_path / row["file"]) for row in rows] == ["RGB", "RGB", "L"]
    images = study_set.read_images(tmp_path, rows, "RGB")
    assert images.objects[2].shape == (3, 28 * 28 * 3) and images.shortcuts["brightness"].shape == (3, 3)


def test_study_refuses_what_it_cannot_study(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make_garments.py"):
        study_set.main([str(tmp_path)])
    (tmp_path / "boxes.csv").write_text("file,label,left,top,right,bottom,source\n")
    with pytest.raises(InputError, match="100 images"):
        study_set.main([str(tmp_path)])
