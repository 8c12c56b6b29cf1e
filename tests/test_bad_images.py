"""Images that nobody has checked: what each kind becomes, and that bad ones are counted and left out."""

import csv
import io
import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Command
from PIL import Image
from ranks import ranks
from test_archives import in_archive
from test_datasets import make_inat

import datasets
import utils
from datasets import DataSource, Folder, TokenLabelled, build_dataset
from loading import images
from loading.images import BadImageError, BadImages, Readable, load_image
from loading.loaders import EvalLoader, Shard

NOISE = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def grey(value: float, dtype: str) -> Image.Image:
    return Image.fromarray(np.full((8, 8), value, dtype))


def palette() -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 250, 0])
    return image


JPEG, PNG = (encoded(Image.fromarray(NOISE), form) for form in ("JPEG", "PNG"))
RED, BLUE = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
GOOD = {
    "16-bit PNG": (encoded(grey(40000, "uint16"), "PNG"), (156, 156, 156)),
    "16-bit TIFF": (encoded(grey(65535, "uint16"), "TIFF"), (255, 255, 255)),
    "16-bit PGM": (encoded(grey(256, "uint16"), "PPM"), (1, 1, 1)),  # in Pillow's mode of 32 bits
    "CMYK": (encoded(Image.new("CMYK", (8, 8), (0, 255, 0, 0)), "TIFF"), (255, 0, 255)),
    "CMYK JPEG": (encoded(Image.new("CMYK", (8, 8), (0, 255, 0, 0)), "JPEG"), (255, 0, 255)),
    "palette": (encoded(palette(), "PNG"), (0, 250, 0)),
    "transparent palette": (encoded(palette(), "PNG", transparency=bytes([255, 128])), (0, 250, 0)),
    "alpha": (encoded(Image.new("RGBA", (8, 8), (9, 8, 7, 0)), "PNG"), (9, 8, 7)),
    "1 bit": (encoded(Image.new("1", (8, 8), 1), "PNG"), (255, 255, 255)),
    "animation": (encoded(RED, "GIF", save_all=True, append_images=[BLUE]), (255, 0, 0)),
    "animated PNG": (encoded(RED, "PNG", save_all=True, append_images=[BLUE]), (255, 0, 0)),
    "1 x 1": (encoded(Image.new("RGB", (1, 1), (5, 6, 7)), "PNG"), (5, 6, 7)),
}
BAD = {
    "no bytes": (b"", "known format"),
    "text": (b"no image at all", "known format"),
    "cut JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "JPEG without its end": (JPEG[:-2], "truncated"),
    "cut PNG": (PNG[: len(PNG) // 2], "truncated"),
    "damaged PNG": (PNG[:500] + b"???" + PNG[503:], "broken data stream"),
    "bomb": (encoded(Image.new("1", (20000, 20000)), "PNG"), "400000000 pixels"),
    "half a bomb": (encoded(Image.new("1", (10000, 10000)), "PNG"), "100000000 pixels"),
    "strip": (encoded(Image.new("RGB", (1, 501)), "PNG"), "1 x 501 pixels"),
    "floats": (encoded(grey(0.5, "float32"), "TIFF"), "no known range"),
    "32 bits": (encoded(grey(70000, "int32"), "TIFF"), "no known range"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", GOOD)
def test_every_kind_becomes_rgb(kind: str, tmp_path: Path) -> None:
    data, colour = GOOD[kind]
    image = load_image(io.BytesIO(data))
    assert image.mode == "RGB" and np.abs(np.array(image)[0, 0].astype(int) - colour).max() == 0
    for make in (datasets.eval_transform, datasets.train_transform):
        assert make(32, datasets.DATA_CONFIG)(image).shape == (3, 32, 32)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", BAD)
def test_bad_kinds_are_named_with_the_reason(kind: str) -> None:
    data, reason = BAD[kind]
    with pytest.raises(BadImageError, match=f"cannot read image some/file.x .*{reason}") as caught:
        load_image(io.BytesIO(data), "some/file.x")
    assert caught.value.line.startswith("some/file.x\t") and "0x" not in caught.value.line
    assert str(BadImageError(str(caught.value))) == str(caught.value)  # as a loading process hands it on


def test_orientation_in_exif_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    data = encoded(Image.fromarray(NOISE), "JPEG", exif=exif)
    assert load_image(io.BytesIO(data)).size == (60, 40)


def test_ordinary_pixels_are_pillows() -> None:
    for data in (JPEG, PNG):
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(np.array(load_image(io.BytesIO(data))), np.array(image.convert("RGB")))


def write_numbered(root: Path, count: int, bad: set[int]) -> Path:
    """Images whose grey level is their number; those of the given numbers are cut off."""
    for number in range(count):
        path = root / "ab"[number * 2 // count] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = encoded(Image.new("RGB", (8, 8), (number,) * 3), "PNG")
        path.write_bytes(data[:40] if number in bad else data)
    return root


def level(image: Image.Image) -> int:
    return image.getpixel((0, 0))[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_bad_images_out(workers: int, tmp_path: Path) -> None:
    bad, size = {1, 4, 5, 11}, 13
    data, listed = Folder(write_numbered(tmp_path / "images", size, bad), level), tmp_path / "new" / "bad.txt"
    read = []
    for rank in range(3):
        loader = EvalLoader(Shard(data, rank, 3, 4, listed), 2, num_workers=workers)
        for _ in range(2):  # the second time nothing is listed again
            numbers = [number for images, _ in loader for number in images.tolist()]
        assert numbers == loader.dataset.read().tolist() == [i for i in range(rank, size, 3) if i not in bad]
        assert set(loader.dataset.bad.numbers()) == bad & set(range(rank, size, 3))
        read += numbers
    assert sorted(read) == sorted(set(range(size)) - bad)
    names, reasons = zip(*(line.split("\t") for line in listed.read_text().splitlines()), strict=True)
    assert {int(Path(name).stem) for name in names} == bad and len(names) == len(bad) and all(reasons)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_takes_the_next_image(workers: int, tmp_path: Path) -> None:
    bad, size = {0, 3, 4, 11}, 12
    data = Readable(Folder(write_numbered(tmp_path, size, bad), level), limit=4)
    loader = torch.utils.data.DataLoader(data, 5, num_workers=workers)
    expected = [1, 1, 2, 5, 5, 5, 6, 7, 8, 9, 10, 1]
    for _ in range(2):
        batches = [(images.tolist(), labels.tolist()) for images, labels in loader]
        assert [len(images) for images, _ in batches] == [5, 5, 2]
        assert sum((images for images, _ in batches), []) == expected
        assert sum((labels for _, labels in batches), []) == [int(number >= 6) for number in expected]
    assert data.bad.numbers() == sorted(bad)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [0, 3])
def test_more_than_the_limit_is_an_error(limit: int, workers: int, tmp_path: Path) -> None:
    folder = write_numbered(tmp_path / "images", 12, {0, 3, 4, 11})
    words = (
        "images cannot be read and --max-bad-images is 3; the last: .*png" if limit else "cannot read image"
    )
    for loader in (
        EvalLoader(Shard(Folder(folder, level), max_bad=limit), 2, num_workers=workers),
        torch.utils.data.DataLoader(Readable(Folder(folder, level), limit), 2, num_workers=workers),
    ):
        with pytest.raises(BadImageError, match=words), utils.loaders_closed():
            list(loader)
        assert not multiprocessing.active_children()


def test_a_data_set_of_bad_images_is_an_error(tmp_path: Path) -> None:
    data = Folder(write_numbered(tmp_path, 4, {0, 1, 2, 3}), level)
    with pytest.raises(BadImageError, match="none of the 4 images"):
        Readable(data, 9)[2]
    loader = EvalLoader(Shard(data, max_bad=9), 2)
    assert list(loader) == []
    with pytest.raises(BadImageError, match="none of the 4 images"):
        loader.dataset.bad.report(torch.device("cpu"))


def test_the_limit_is_of_all_processes(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    others = torch.tensor([1, 1, 0, 0, 0])
    monkeypatch.setattr(images, "sum_over_ranks", lambda flags: flags + others)
    bad = BadImages(5, 3)
    bad.add(1, BadImageError("b", "why"))
    bad.add(3, BadImageError("d", "why"))
    with caplog.at_level("INFO", logger="adaptive-vit"):
        for _ in range(2):
            bad.report(torch.device("cpu"))
    assert bad.numbers() == [0, 1, 3] and bad.read(1, 3).tolist() == [4]
    assert caplog.text.count("3 of 5 images could not be read") == 1
    others[4] = 1
    with pytest.raises(BadImageError, match="4 images cannot be read and --max-bad-images is 3"):
        bad.report(torch.device("cpu"))


def test_the_same_line_is_written_once_and_any_name_can_be(tmp_path: Path) -> None:
    for _ in range(2):  # as two runs
        bad = BadImages(5, 5, tmp_path / "bad.txt")
        for index in (3, 1, 3):
            bad.add(index, BadImageError(f"a \udcff b{index}", "why"))
    assert (tmp_path / "bad.txt").read_text().splitlines() == [f"a \\udcff b{i}\twhy" for i in (3, 1)]


@pytest.fixture(autouse=True, scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TORCH_HOME", "HF_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.mark.parametrize("kind", ["lmdb", "wds", "hfds"])
def test_archives_know_their_bad_images(kind: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_numbered(tmp_path / "images" / split, 12, {4, 9})
    name, root = in_archive(kind, tmp_path / "images", tmp_path / "archive")
    data = build_dataset(DataSource(name, root, use_lmdb=kind == "lmdb"), "val", level)
    loader = EvalLoader(Shard(data, max_bad=2, bad_list=tmp_path / "bad.txt"), 4)
    numbers = [number for images, _ in loader for number in images.tolist()]
    assert sorted(numbers) == [i for i in range(12) if i not in (4, 9)]
    lines = (tmp_path / "bad.txt").read_text().splitlines()
    assert len(lines) == 2 and all(", record " in line for line in lines)


def test_inaturalist_and_token_labels_know_their_bad_images(tmp_path: Path) -> None:
    make_inat(tmp_path, 2018, with_kingdom=True)
    data = build_dataset(DataSource("INAT", tmp_path), "val", level)
    data.samples[1][0].write_bytes(b"")
    data.samples[2][0].unlink()  # announced and not there
    assert Readable(data, 2)[1] == data[0]
    folder = Folder(write_numbered(tmp_path / "folder", 4, {1}))
    for path, _ in folder.samples:
        label = tmp_path / "labels" / Path(path).parent.name / f"{Path(path).stem}.pt"
        label.parent.mkdir(parents=True, exist_ok=True)
        if "01" not in path:  # none can have been made of the bad image
            torch.save(torch.zeros(2, 1, 3, 3), label)
    labelled = TokenLabelled(folder, tmp_path / "labels", lambda image, label: (level(image), label.shape))
    assert Readable(labelled, 1)[1] == (2, (2, 1, 3, 3))


# Commands


@pytest.fixture(scope="module")
def damaged(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The data folder with three bad images in each split, and the one without these."""
    root = tmp_path_factory.mktemp("damaged")
    for name in ("damaged", "cleaned"):
        shutil.copytree(folder, root / name)
        for split in ("train", "val"):
            for number, image in enumerate(("amber/03", "coral/00", "coral/07")):
                path = root / name / split / f"{image}.png"
                if name == "damaged":
                    path.write_bytes(path.read_bytes()[: 60 * number])
                else:
                    path.unlink()
    return {name: root / name for name in ("damaged", "cleaned")}


@pytest.fixture
def infer(command: Command, sharp: Path, tmp_path: Path) -> Callable[..., tuple]:
    """Runs dynamic_inference; returns how it ended, what it stored and what it listed."""

    def infer(data: Path, *argv: object, limit: int = 3) -> tuple:
        target = tmp_path / data.name / "results.json"
        flags = ["--checkpoint_path", sharp, "--data_url", data, "--device", "cpu", "--num_workers", 2]
        flags += ["--batch_size", 8, "--threshold", 0.3, "--repeats", 1, "--results", target]
        ended = command("dynamic_inference", *flags, "--max-bad-images", limit, *argv)
        listed = target.with_name("bad_images.txt")
        lines = listed.read_text().splitlines() if listed.exists() else []
        return ended, json.loads(target.read_text()) if target.exists() else None, lines

    return infer


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_accuracy_is_over_the_images_that_were_read(mode: int, infer: Callable, damaged: dict) -> None:
    ended, results, lines = infer(damaged["damaged"], "--eval-mode", mode)
    assert ended.code == 0 and len(lines) == 3, ended.err
    assert ended.err.count("3 of 40 images could not be read: ") == 1
    _, expected, none = infer(damaged["cleaned"], "--eval-mode", mode)
    assert none == []
    if mode == 2:
        results, expected = (
            {key: r["timed"][key] for key in ("exit_shares", "accuracy")} for r in (results, expected)
        )
    assert results == expected


def test_one_too_many_is_one_line_and_code_2(infer: Callable, damaged: dict) -> None:
    for limit, words in ((2, "--max-bad-images is 2"), (0, "cannot read image")):
        ended, results, _ = infer(damaged["damaged"], "--eval-mode", 0, limit=limit)
        lines = [line for line in ended.err.splitlines() if "dynamic_inference.py" in line]
        assert ended.code == 2 and results is None
        assert len(lines) == 1 and words in lines[0] and "val/" in lines[0] and "Traceback" not in ended.err
        assert not multiprocessing.active_children()


def test_prediction_writes_a_row_without_a_class(
    command: Command, sharp: Path, damaged: dict, tmp_path
) -> None:
    flags = ["--checkpoint_path", sharp, "--device", "cpu", "--num_workers", 0, "--max-bad-images", 3]
    rows = {}
    for name, data in damaged.items():
        argv = [*flags, "--images", data / "val", "--output", tmp_path / f"{name}.csv"]
        assert command("dynamic_inference", *argv).code == 0
        with open(tmp_path / f"{name}.csv", newline="") as file:
            rows[name] = {str(Path(row.pop("file")).relative_to(data)): row for row in csv.DictReader(file)}
    bad = rows["damaged"].keys() - rows["cleaned"].keys()
    assert len(rows["damaged"]) == 40 and bad == {
        f"val/{n}.png" for n in ("amber/03", "coral/00", "coral/07")
    }
    assert all(set(rows["damaged"].pop(name).values()) == {""} for name in bad)
    assert rows["damaged"] == rows["cleaned"]
    assert len((tmp_path / "bad_images.txt").read_text().splitlines()) == 3


def test_without_a_place_the_log_lists_them(command: Command, sharp: Path, damaged: dict, tmp_path) -> None:
    shutil.copy(sharp, tmp_path / "copy.pth")
    flags = ["--checkpoint_path", tmp_path / "copy.pth", "--data_url", damaged["damaged"], "--num_workers", 0]
    ended = command("dynamic_inference", *flags, "--eval-mode", 0, "--max-bad-images", 3, "--device", "cpu")
    assert ended.code == 0 and ended.err.count("cannot be read: ") == 3
    assert "3 of 40 images could not be read\n" in ended.err


@pytest.mark.slow
def test_two_processes_count_together(infer: Callable, sharp: Path, damaged: dict, tmp_path: Path) -> None:
    data, target = damaged["damaged"], tmp_path / "two" / "results.json"
    flags = ["--checkpoint_path", sharp, "--data_url", data, "--num_workers", 1, "--batch_size", 8]
    flags += ["--eval-mode", 0, "--device", "cpu", "--results", target, "--max-bad-images"]
    first, second = ranks("dynamic_inference", *flags, 3)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "3 of 40 images could not be read" in first.err
    assert json.loads(target.read_text()) == infer(damaged["cleaned"], "--eval-mode", 0)[1]
    assert len((tmp_path / "two" / "bad_images.txt").read_text().splitlines()) == 3


def test_pictures_are_of_the_others(command: Command, sharp: Path, damaged: dict, tmp_path: Path) -> None:
    flags = ["--resume", sharp, "--data-path", damaged["damaged"], "--num-images", 40, "--device", "cpu"]
    flags += ["--output_dir", tmp_path / "pictures", "--max-bad-images"]
    assert command("visualize", *flags, 2).code == 2
    ended = command("visualize", *flags, 3)
    assert ended.code == 0, ended.err
    assert len(list((tmp_path / "pictures").glob("label*.png"))) == 37
    assert len((tmp_path / "pictures" / "bad_images.txt").read_text().splitlines()) == 3


TRAIN = "--model lf_deit_nano --epochs 2 --batch-size 32 --device cpu --model-kwargs embed_dim=32 depth=2"


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", ["--num_workers 0", "--num_workers 2 --persistent-workers --prefetch-factor 1"]
)
def test_training_goes_on_with_other_images(extra: str, command: Command, damaged: dict, tmp_path) -> None:
    flags = [*TRAIN.split(), *extra.split(), "--data-path", damaged["damaged"], "--no-repeated-aug"]
    ended = command("main_deit", *flags, "--output_dir", tmp_path / "out", "--max-bad-images", 3)
    assert ended.code == 0, ended.err
    assert ended.err.count("3 of 64 images could not be read: ") == 1
    assert ended.err.count("3 of 40 images could not be read: ") == 1
    lines = (tmp_path / "out" / "bad_images.txt").read_text().splitlines()
    assert len({line.split("\t")[0] for line in lines}) == len(lines) == 6
    ended = command("main_deit", *flags, "--output_dir", tmp_path / "two", "--max-bad-images", 2)
    assert ended.code == 2 and "--max-bad-images is 2" in ended.err.splitlines()[-1]
    assert "train/" in ended.err.splitlines()[-1] and "Traceback" not in ended.err
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_training_is_the_same_however_it_is_loaded(command: Command, damaged: dict, tmp_path) -> None:
    """With bad images, with or without processes, and whoever normalises."""
    losses = []
    ways = ("--num_workers 0", "--num_workers 2 --persistent-workers", "--num_workers 0 --device-normalize")
    for number, way in enumerate(ways):
        flags = [*TRAIN.split(), *way.split(), "--reprob", 0, "--data-path", damaged["damaged"]]
        flags += ["--output_dir", tmp_path / str(number), "--max-bad-images", 3]
        assert command("main_deit", *flags).code == 0
        log = (tmp_path / str(number) / "log.txt").read_text().splitlines()
        losses.append([json.loads(line)["train_loss"] for line in log])
    assert losses[0] == losses[1] == pytest.approx(losses[2], abs=1e-6)
