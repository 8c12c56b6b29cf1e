"""Tests of archives: the same images and labels as in the folder they are made from, each exactly once."""

import gzip
import importlib
import io
import json
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import struct
import sys
import tarfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import lmdb
import numpy as np
import pytest
from cases import ROOT, Command
from PIL import Image
from ranks import ranks
from torch.utils.data import DataLoader, Dataset

import datasets
import main_deit
from datasets import DataSource, Folder, build_dataset
from loading import archives
from loading.archives import Lmdb

sys.path.insert(0, str(ROOT / "scripts"))
import folder2lmdb

from checkpointing.format import load_checkpoint

KINDS = ("lmdb", "wds", "hfds")
TRAIN = (
    "--model lf_deit_nano --epochs 1 --batch-size 32 --device cpu --num_workers 0 --picture-freq 0".split()
)


@pytest.fixture(autouse=True, scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Places in shards and tables of Hugging Face go to a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TORCH_HOME", "HF_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 41 training and 23 validation images in 3 classes; the grey level is the image's number."""
    root = tmp_path_factory.mktemp("numbered") / "pictures"
    for split, count in (("train", 41), ("val", 23)):
        for number in range(count):
            path = root / split / "cab"[number % 3] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, number, number)).save(path)
    return root


def write_shards(root: Path, split: str, folder: Folder, sizes: list[int], key: str = "") -> list[str]:
    """Puts the images of a folder into tar shards of the given sizes, as WebDataset's tools do."""
    samples, names = iter(folder.samples), []
    for shard, size in enumerate(sizes):
        names.append(f"{split}-{shard:04}.tar")
        with tarfile.open(root / names[-1], "w") as tar:
            for number in range(size):
                path, label = next(samples)
                side = {"json": json.dumps({key: label}).encode()} if key else {"cls": str(label).encode()}
                for ending, data in ({"png": Path(path).read_bytes()} | side).items():
                    member = tarfile.TarInfo(f"some/{shard}.d/{number:04}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    assert next(samples, None) is None
    return names


def write_info(root: Path, splits: dict[str, tuple[list[str], list[int]]], key: str = "") -> None:
    entries = {
        name: dict(name=name, num_samples=sum(sizes), filenames=files, shard_lengths=sizes, alt_label=key)
        for name, (files, sizes) in splits.items()
    }
    (root / "_info.json").write_text(json.dumps({"splits": entries}))


def make_wds(folder: Path, root: Path) -> Path:
    """Three shards of unequal sizes, fewer than all workers; _info.json calls val validation."""
    root.mkdir()
    described = {}
    for split, name in (("train", "train"), ("val", "validation")):
        images = Folder(folder / split)
        sizes = [len(images) - 8, 7, 1]
        described[name] = (write_shards(root, name, images, sizes), sizes)
        (root / "classes.txt").write_text("\n".join(images.classes))
    write_info(root, described)
    return root


def make_lmdb(folder: Path, root: Path) -> Path:
    root.mkdir()
    for split in ("train", "val"):
        folder2lmdb.convert(Folder(folder / split), root / f"{split}.lmdb")
    return root


def in_archive(kind: str, folder: Path, root: Path) -> tuple[str, Path]:
    """--data-set and --data-path of a folder's images in an archive; skips where a package is missing."""
    if kind == "wds":
        pytest.importorskip("webdataset")
        return "wds/numbered", make_wds(folder, root)
    if kind == "hfds":
        if archives_missing():
            pytest.skip("the Hugging Face package is not installed")
        return "hfds/imagefolder", folder
    return "IMNET", make_lmdb(folder, root)


def archives_missing() -> bool:
    from loading.hugging_face import load_hugging_face

    try:
        load_hugging_face()
    except ValueError:
        return True
    return False


@pytest.fixture(scope="module", params=KINDS)
def source(
    request: pytest.FixtureRequest, numbered: Path, tmp_path_factory: pytest.TempPathFactory
) -> DataSource:
    """The numbered images in each kind of archive."""
    data_set, root = in_archive(request.param, numbered, tmp_path_factory.mktemp(request.param) / "archive")
    return DataSource(data_set, root, use_lmdb=request.param == "lmdb")


def number(image: Image.Image) -> int:
    """Of an image of the fixture `numbered`."""
    return image.getpixel((0, 0))[0]


def read(data: Dataset) -> list[tuple[int, int]]:
    return [(number(image), label) for image, label in data]


def content(path: Path) -> dict[bytes, bytes]:
    with (
        lmdb.open(str(path), subdir=False, readonly=True, lock=False) as opened,
        opened.begin() as transaction,
    ):
        return dict(transaction.cursor())


# Every kind


@pytest.mark.parametrize("split", ["train", "val"])
def test_archive_equals_its_folder(split: str, source: DataSource, numbered: Path) -> None:
    folder, archive = build_dataset(DataSource("IMNET", numbered), split), build_dataset(source, split)
    assert archive.classes == folder.classes == ["a", "b", "c"]
    assert len(archive) == len(folder) and read(archive) == read(folder)
    assert [archive.record(i)[0] for i in range(3)] == [Path(p).read_bytes() for p, _ in folder.samples[:3]]
    assert archive[0][0].mode == "RGB"
    transformed = build_dataset(source, split, number)
    assert transformed[5] == (read(folder)[5][0], folder[5][1])


def test_classes_of_a_model_renumber_an_archive(source: DataSource, numbered: Path) -> None:
    wanted = ["c", "x", "b", "a"]
    folder = build_dataset(DataSource("IMNET", numbered), "val", classes=wanted)
    archive = build_dataset(source, "val", classes=wanted)
    assert archive.classes == wanted and read(archive) == read(folder)
    with pytest.raises(ValueError, match="class 'b'.*not among"):
        build_dataset(source, "val", classes=["a", "c"])


def test_absent_class_is_told(
    source: DataSource, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "adaptive-vit")
    assert build_dataset(source, "train").present() == {0, 1, 2}
    assert "classes have no" not in caplog.text
    build_dataset(source, "train", classes=["c", "x", "b", "a"])
    assert caplog.messages[-1] == "1 of 4 classes have no training image: x"


@pytest.mark.slow
def test_archive_survives_pickling_and_workers(source: DataSource) -> None:
    data = build_dataset(source, "val", number)
    expected = list(data)
    copy = pickle.loads(pickle.dumps(data))
    assert list(data) == expected == list(copy)  # both handles work, in this order and the other
    for _ in range(2):
        assert loaded(data, 2, "fork") == expected == list(data)
    if source.data_set.startswith("hfds"):
        assert loaded(data, 1, "spawn") == expected
    assert sys.modules["datasets"] is datasets


def loaded(data: Dataset, workers: int, start: str) -> list[tuple[int, int]]:
    loader = DataLoader(data, 4, num_workers=workers, multiprocessing_context=start)
    return [pair for batch in loader for pair in zip(*(part.tolist() for part in batch), strict=True)]


@pytest.fixture(scope="module")
def by_two(numbered: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What two processes of two workers saw: [kind][split][epoch][rank] -> images by batch."""
    sources = {}
    for kind in KINDS:
        if kind == "wds" and not find_spec("webdataset") or kind == "hfds" and archives_missing():
            continue
        data_set, root = in_archive(kind, numbered, tmp_path_factory.mktemp("two") / kind)
        sources[kind] = dict(data_set=data_set, root=str(root), use_lmdb=kind == "lmdb")
    first, second = ranks("archive_ranks", json.dumps(sources))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    return json.loads(first.out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_of_two_workers_evaluate_every_image_once_in_order(
    kind: str, by_two: dict[str, dict], numbered: Path
) -> None:
    if kind not in by_two:
        pytest.skip("its package is not installed")
    in_order = [number for number, _ in read(build_dataset(DataSource("IMNET", numbered), "val"))]
    assert sorted(in_order) == list(range(23))
    for parts in by_two[kind]["val"]:
        assert [[image for batch in rank for image in batch] for rank in parts] == [
            in_order[::2],
            in_order[1::2],
        ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_of_two_workers_train_on_every_image_once(kind: str, by_two: dict[str, dict]) -> None:
    """Shares are made equal: of 41 images one is seen twice. 21 fill batches of 3: none is left out."""
    if kind not in by_two:
        pytest.skip("its package is not installed")
    orders = []
    for parts in by_two[kind]["train"]:
        assert [[len(batch) for batch in rank] for rank in parts] == [[3] * 7] * 2
        orders.append([image for rank in parts for batch in rank for image in batch])
        assert sorted(Counter(orders[-1]).values()) == [1] * 40 + [2]
    assert len(orders) == 2 and orders[0] != orders[1] and sorted(orders[0]) != orders[0]
    assert by_two[kind]["train"] == by_two["lmdb"]["train"]  # whatever the archive


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[dict, dict]]:
    """Results by folder, to train there only once."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_commands_do_the_same_on_archives_as_on_folders(
    kind: str, command: Command, folder: Path, tmp_path: Path, expected: dict
) -> None:
    def results(root: Path, *words: str) -> tuple[dict, dict]:
        """The log of training and what inference finds."""
        output = tmp_path / "output" / root.name
        ended = command("main_deit", *TRAIN, "--data-path", root, *words, "--output_dir", output)
        assert ended.code == 0, ended.err
        file = output / "results.json"
        checked = ["--eval-mode", 0, "--checkpoint_path", output / "checkpoint.pth", "--results", file]
        ended = command("dynamic_inference", "--data_url", root, *words, *checked, "--num_workers", 0)
        assert ended.code == 0, ended.err
        names = load_checkpoint(output / "checkpoint.pth")["class_names"]
        return json.loads((output / "log.txt").read_text()), json.loads(file.read_text()), names

    data_set, root = in_archive(kind, folder, tmp_path / "archive")
    if not expected:
        expected["folder"] = results(folder)
    switch = ["--use-lmdb"] if kind == "lmdb" else []
    assert results(root, "--data-set", data_set, *switch) == expected["folder"]
    assert expected["folder"][2] == ["amber", "blue", "coral", "dusk"]
    checkpoint = tmp_path / "output" / root.name / "checkpoint.pth"
    resumed = ["--resume", str(checkpoint), "--data-path", "elsewhere"]
    assert not main_deit.parse(resumed)[0].use_lmdb  # as the path, which it belongs to


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--use-lmdb", "no file .*train.lmdb: make it with scripts/folder2lmdb.py"),
        ("--use-lmdb --data-set wds/x", "--use-lmdb goes with --data-set IMNET; --data-set is wds/x"),
        ("--use-lmdb --token-label --token-label-data x --mixup 0 --cutmix 0", "without .*--use-lmdb"),
        ("--data-set wds/x", "has no shards of train"),
        ("--data-set wds/x --data-path nowhere", "no folder nowhere"),
        ("--data-set hfds/ --data-path nowhere", "no folder nowhere"),
        ("--data-set hfds//no/where", "/no/where"),
        ("--data-set webdataset/x", "'webdataset/x' is none of IMNET, .*wds/NAME, hfds/NAME"),
    ],
)
def test_bad_input_is_one_line_and_code_2(words: str, message: str, command: Command, tmp_path: Path) -> None:
    if "hfds" in words and archives_missing():
        pytest.skip("the Hugging Face package is not installed")
    ended = command("main_deit", *TRAIN, "--data-path", tmp_path, *words.split())
    assert ended.code == 2 and len(ended.err.splitlines()) == 1
    assert re.search(message, ended.err)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, numbered: Path, tmp_path: Path) -> None:
    from loading import hugging_face

    monkeypatch.setattr(hugging_face, "load_hugging_face", hugging_face.load_hugging_face.__wrapped__)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="pip install 'datasets>=4'"):
        patch.setattr(hugging_face, "version", lambda name: "3.6.0")
        build_dataset(DataSource("hfds/", numbered), "train")
    monkeypatch.setattr(hugging_face.PathFinder, "find_spec", lambda *_: None)
    with pytest.raises(ValueError, match="pip install 'datasets>=4'"):
        build_dataset(DataSource("hfds/", numbered), "train")
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match="pip install webdataset"):
        build_dataset(DataSource("wds/", tmp_path), "train-{0..3}.tar")
    (tmp_path / "train.lmdb").touch()
    with pytest.raises(ValueError, match="pip install lmdb"):
        build_dataset(DataSource("IMNET", tmp_path, use_lmdb=True), "train")
    with pytest.raises(ValueError, match="pip install lmdb"):
        folder2lmdb.convert(Folder(numbered / "train"), tmp_path / "new.lmdb")


# LMDB


def test_records_are_plain(numbered: Path, tmp_path: Path) -> None:
    """The layout, read without this project's code."""
    folder = Folder(numbered / "val")
    entries = content(make_lmdb(numbered, tmp_path / "made") / "val.lmdb")
    assert entries.pop(b"__len__") == b"23"
    assert json.loads(entries.pop(b"__classes__")) == ["a", "b", "c"]
    assert json.loads(entries.pop(b"__labels__")) == [0, 1, 2]
    entries.pop(b"__source__")
    assert set(entries) == {str(i).encode() for i in range(23)}
    for index, (path, label) in enumerate(folder.samples):
        record = entries[str(index).encode()]
        assert record[:4] == b"IMGR" and struct.unpack("<Iq", record[4:16]) == (1, label)
        assert record[16:] == Path(path).read_bytes()


def test_folder2lmdb_makes_a_file_per_split(command: Command, numbered: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    ended = command("folder2lmdb", "--dir", numbered, "--output", output)
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in output.iterdir()) == ["train.lmdb", "val.lmdb"]
    assert "train.lmdb: 41 images, all as in" in ended.err and "compared 41 of 41" in ended.err
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    ended = command("folder2lmdb", "--dir", numbered, "--output", output, "--splits", "val")
    assert ended.code == 0 and "there already" in ended.err
    assert before == {path: path.stat().st_mtime_ns for path in output.iterdir()}
    ended = command("folder2lmdb", "--dir", numbered, "--output", output, "--splits", "train", "test")
    assert ended.code == 2 and "no folder" in ended.err


def test_hidden_entries_are_not_converted(command: Command, numbered: Path, tmp_path: Path) -> None:
    shutil.copytree(numbered, tmp_path / "in")
    for name in (".ipynb_checkpoints/0.png", "a/._0.png", "b/.x/0.png"):
        (tmp_path / "in" / "val" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / "val" / name).write_bytes(png())
    ended = command("folder2lmdb", "--dir", tmp_path / "in", "--splits", "val")
    assert ended.code == 0 and "val: left out: 3 hidden" in ended.err
    folder2lmdb.convert(Folder(numbered / "val"), tmp_path / "clean.lmdb")
    assert content(tmp_path / "in" / "val.lmdb") == content(tmp_path / "clean.lmdb")
    names = {b"__classes__": b'[".ipynb_checkpoints", "b"]'}
    with pytest.raises(ValueError, match="hidden folder .ipynb_checkpoints as a class: convert"):
        Lmdb(write_lmdb(tmp_path / "old.lmdb", GOOD | names))


def test_val_without_class_folders_is_converted(command: Command, numbered: Path, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    folder, lines = Folder(numbered / "val"), []
    for path, label in folder.samples:
        shutil.copy(path, tmp_path / "val")
        lines.append(f"{Path(path).stem},{folder.classes[label]}\n")
    (tmp_path / "labels.csv").write_text("".join(lines))
    ended = command(
        "folder2lmdb", "--dir", tmp_path, "--splits", "val", "--val-labels", tmp_path / "labels.csv"
    )
    assert ended.code == 0, ended.err
    data = build_dataset(DataSource("IMNET", tmp_path, use_lmdb=True), "val")
    assert read(data) == sorted(read(folder)) and data.classes == folder.classes


def test_missing_val_is_found_under_its_other_names(numbered: Path, tmp_path: Path) -> None:
    folder2lmdb.convert(Folder(numbered / "train"), tmp_path / "test.lmdb")
    assert len(build_dataset(DataSource("IMNET", tmp_path, use_lmdb=True), "val")) == 41
    folder2lmdb.convert(Folder(numbered / "val"), tmp_path / "validation.lmdb")
    assert len(build_dataset(DataSource("IMNET", tmp_path, use_lmdb=True), "val")) == 23


def test_other_images_are_not_overwritten(numbered: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.lmdb"
    folder2lmdb.convert(Folder(numbered / "val"), target)
    before = target.read_bytes()
    with pytest.raises(ValueError, match="holds other images"):
        folder2lmdb.convert(Folder(numbered / "train"), target)
    assert target.read_bytes() == before


@pytest.mark.parametrize("after", [0, 1, 10, 22])
def test_stopped_conversion_goes_on_where_it_was(
    after: int,
    numbered: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, target = Folder(numbered / "val"), tmp_path / "x.lmdb"
    reads: list[Path] = []

    class Stopping(type(Path())):
        def read_bytes(self) -> bytes:
            if len(reads) == after:
                raise KeyboardInterrupt
            reads.append(self)
            return super().read_bytes()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folder2lmdb, "Path", Stopping)
        folder2lmdb.convert(folder, target, threads=1, batch=4)
    assert not target.exists()
    kept = after // 4 * 4  # whole transactions
    caplog.set_level(logging.INFO, "adaptive-vit")
    folder2lmdb.convert(folder, target, batch=4)
    assert (f"{kept} of 23 images are there" in caplog.text) == (kept > 0)
    folder2lmdb.convert(folder, tmp_path / "y.lmdb")
    assert content(target) == content(tmp_path / "y.lmdb")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.lmdb", "y.lmdb"]


def test_killed_process_leaves_a_file_to_go_on_with(numbered: Path, tmp_path: Path) -> None:
    """Killed without any clean-up in the middle of a transaction."""
    put, calls = folder2lmdb.put, []

    def dying(environment: lmdb.Environment, items: list) -> None:
        calls.append(items)
        if len(calls) == 4:  # after the set-up and two batches
            transaction = environment.begin(write=True)
            transaction.put(*items[0])
            os.kill(os.getpid(), signal.SIGKILL)
        put(environment, items)

    def child() -> None:
        folder2lmdb.put = dying
        folder2lmdb.convert(Folder(numbered / "val"), tmp_path / "x.lmdb", batch=4)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.lmdb.part", ".x.lmdb.part-lock"]
    with lmdb.open(str(tmp_path / ".x.lmdb.part"), subdir=False, readonly=True) as opened:
        assert folder2lmdb.count(opened) == 8
    folder2lmdb.convert(Folder(numbered / "val"), tmp_path / "x.lmdb")
    folder2lmdb.convert(Folder(numbered / "val"), tmp_path / "y.lmdb")
    assert content(tmp_path / "x.lmdb") == content(tmp_path / "y.lmdb")


def test_unfinished_file_of_other_images_is_refused(
    numbered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folder2lmdb, "advance", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        folder2lmdb.convert(Folder(numbered / "val"), tmp_path / "x.lmdb", batch=4)
    with pytest.raises(ValueError, match="x.lmdb.part: it was begun with other classes or files; remove it"):
        folder2lmdb.convert(Folder(numbered / "train"), tmp_path / "x.lmdb")


def test_what_differs_from_the_folder_gets_no_name(
    numbered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte of one record, or one label, is changed between writing and comparing."""
    put = folder2lmdb.put

    def spoil(environment: lmdb.Environment, items: list) -> None:
        put(environment, [(k, v[:at] + b"\xee" + v[at + 1 :]) if k == b"7" else (k, v) for k, v in items])

    monkeypatch.setattr(folder2lmdb, "put", spoil)
    for at in (8, 40):
        target = tmp_path / f"{at}.lmdb"
        with pytest.raises(ValueError, match="has changed since it was read; remove it and begin anew"):
            folder2lmdb.convert(Folder(numbered / "val"), target)
        assert not target.exists()


def test_map_grows(tmp_path: Path, numbered: Path) -> None:
    """A map of 16 KiB takes a megabyte, also where one transaction alone is larger than the map."""
    noise = np.random.default_rng(0)
    for index in range(12):
        (tmp_path / "in" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "a" / f"{index:02}.png").write_bytes(noise.bytes(100_000))
    folder = Folder(tmp_path / "in")
    for batch in (1, 12):
        folder2lmdb.convert(folder, tmp_path / f"{batch}.lmdb", batch=batch, map_size=2**14)
        entries = content(tmp_path / f"{batch}.lmdb")
        for index, (path, _) in enumerate(folder.samples):
            assert entries[str(index).encode()][16:] == Path(path).read_bytes()
        assert (tmp_path / f"{batch}.lmdb").stat().st_size < 2_000_000  # not as large as the map


def write_lmdb(path: Path, entries: dict[bytes, bytes]) -> Path:
    with lmdb.open(str(path), subdir=False, lock=False) as opened, opened.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    return path


def png(level: int = 7) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(file, "png")
    return file.getvalue()


GOOD = {b"__len__": b"2", b"__classes__": b'["a", "b"]', b"0": archives.pack(0, png())}


def test_databases_of_other_layouts_are_told(tmp_path: Path) -> None:
    """The old script's values are serialised pairs, with lists of keys and a length of the same kind."""
    old = {
        b"0": b"\xff\xff\xff\xff\x80\x01" + png(),
        b"__len__": b"\xff\xff\x10\x00",
        b"__keys__": b"\xff\xff",
    }
    others = {"old": old, "old2": old | {b"__classes__": b"[]"}, "empty": {}, "mapless": {b"0": GOOD[b"0"]}}
    for name, entries in others.items():
        with pytest.raises(ValueError, match="of another layout.*again with scripts/folder2lmdb.py"):
            Lmdb(write_lmdb(tmp_path / name, entries))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Lmdb(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "record 1 is missing or damaged"),
        (GOOD[b"0"][:9], "record 1 is missing or damaged"),
        (b"XXXX" + GOOD[b"0"][4:], "record 1 is missing or damaged"),
        (struct.pack("<4sIq", b"IMGR", 2, 0) + png(), "record 1 has version 2"),
        (archives.pack(2, png()), "record 1 has the label 2: it must be 0 to 1"),
        (archives.pack(-1, png()), "record 1 has the label -1"),
        (archives.pack(1, png()[:50]), "cannot read image .*x.lmdb, record 1"),
        (archives.pack(1, b""), "cannot read image .*x.lmdb, record 1"),
    ],
    ids=["missing", "short", "foreign", "newer", "beyond", "negative", "cut", "empty"],
)
def test_damaged_record_is_named(record: bytes | None, message: str, tmp_path: Path) -> None:
    data = Lmdb(write_lmdb(tmp_path / "x.lmdb", GOOD | ({b"1": record} if record is not None else {})))
    assert number(data[0][0]) == 7
    with pytest.raises(ValueError, match=message) as caught:
        data[1]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_cut_file_is_an_error_and_no_crash(keep: float, numbered: Path, tmp_path: Path) -> None:
    path = make_lmdb(numbered, tmp_path / "made") / "val.lmdb"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ValueError, match="is cut off"):
        Lmdb(path)
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(ValueError, match="not a readable LMDB file"):
        Lmdb(path)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = pickle.dumps(print)
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("unpickled"))
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("unpickled"))
    with pytest.raises(ValueError, match="layout"):
        Lmdb(write_lmdb(tmp_path / "x.lmdb", GOOD | {b"0": bomb}))
    data = Lmdb(write_lmdb(tmp_path / "y.lmdb", GOOD | {b"1": archives.pack(1, bomb)}))
    with pytest.raises(ValueError, match="cannot read image"):
        data[1]


def test_handle_of_the_parent_lives_on_after_a_fork(numbered: Path, tmp_path: Path) -> None:
    data = Lmdb(make_lmdb(numbered, tmp_path / "made") / "val.lmdb", number)
    expected = [data[i] for i in range(23)]  # opened here
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def child() -> None:
        queue.put(([data[i] for i in range(23)], archives.environments[data.path][0]))

    process = context.Process(target=child)
    process.start()
    assert queue.get() == (expected, process.pid)  # through a handle of its own
    process.join()
    assert process.exitcode == 0 and [data[i] for i in range(23)] == expected
    twin = Lmdb(data.path, number)  # the same file twice in one process
    assert [twin[i] for i in range(23)] == expected


# Tar shards


def test_shards_by_name_by_pattern_and_by_list(numbered: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    folder = Folder(numbered / "val")
    expected = read(folder)
    files = write_shards(tmp_path, "val", folder, [5, 18])
    (tmp_path / "value.tar").write_bytes(b"not of this split")
    assert read(build_dataset(DataSource("wds/", tmp_path), "val")) == expected
    assert read(build_dataset(DataSource("wds/x", tmp_path), "val-{0000..0001}.tar")) == expected
    nameless = build_dataset(DataSource("wds/x", tmp_path), "val")
    assert nameless.classes == ["0", "1", "2"]
    write_info(tmp_path, {"val": (files[1:], [18])})
    assert read(build_dataset(DataSource("wds/x", tmp_path), "val")) == expected[5:]
    with pytest.raises(FileNotFoundError, match="no shards of train: split train not found"):
        build_dataset(DataSource("wds/x", tmp_path), "train")


def test_labels_in_json_and_left_out_samples(numbered: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    folder = Folder(numbered / "val")
    expected = read(folder)
    folder.samples = [(path, label if i != 4 else -1) for i, (path, label) in enumerate(folder.samples)]
    files = write_shards(tmp_path, "val", folder, [23], key="species")
    write_info(tmp_path, {"val": (files, [23])}, key="species")
    assert read(build_dataset(DataSource("wds/x", tmp_path), "val")) == expected[:4] + expected[5:]


def test_numbers_without_names_stand_for_those_of_the_model(numbered: Path, tmp_path: Path) -> None:
    write_shards(tmp_path, "val", Folder(numbered / "val"), [23])
    data = build_dataset(DataSource("wds/x", tmp_path), "val", classes=["p", "q", "r", "s"])
    assert data.classes == ["p", "q", "r", "s"] and {label for _, label in data} == {0, 1, 2}
    with pytest.raises(ValueError, match="3 classes, but the model 2"):
        build_dataset(DataSource("wds/x", tmp_path), "val", classes=["p", "q"])
    (tmp_path / "classes.txt").write_text("p\nq\n")
    with pytest.raises(ValueError, match="classes.txt has 2 classes, and there is a label 2"):
        build_dataset(DataSource("wds/x", tmp_path), "val")


def test_places_are_looked_up_once_for_the_same_files(
    numbered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned = []
    scan = archives.scan
    monkeypatch.setattr(archives, "scan", lambda path, *keys: scanned.append(path) or scan(path, *keys))
    write_shards(tmp_path, "val", Folder(numbered / "val"), [13, 10])
    first = read(build_dataset(DataSource("wds/x", tmp_path), "val"))
    assert len(scanned) == 2 and read(build_dataset(DataSource("wds/x", tmp_path), "val")) == first
    assert len(scanned) == 2
    time.sleep(0.01)  # another time of change
    write_shards(tmp_path, "val", Folder(numbered / "train"), [1, 40])
    assert len(build_dataset(DataSource("wds/x", tmp_path), "val")) == 41 and len(scanned) == 4


def test_damaged_shards(numbered: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    files = write_shards(tmp_path, "val", Folder(numbered / "val"), [13, 10])
    second = tmp_path / files[1]
    whole = second.read_bytes()
    broken = "is not a readable tar file"
    for data, message in (
        (whole[:5220], f"{files[1]} {broken}.*at byte 5120"),  # within a header
        (whole[:4096], f"{files[1]} {broken}.*at byte 4096"),  # between two samples
        (whole[:4700], f"{files[1]} {broken}"),
        (whole.replace(b"0003.png", b"0003.bmp"), f"{files[1]} {broken}.*damaged"),  # and its sum left wrong
        (whole[:100], f"{files[1]} {broken}"),
        (b"", f"{files[1]} {broken}"),
        (b"no tar file" * 100, f"{files[1]} {broken}"),
        (gzip.compress(whole), f"{files[1]} {broken}"),
    ):
        second.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            build_dataset(DataSource("wds/x", tmp_path), "val")
    second.write_bytes(whole)
    write_info(tmp_path, {"val": (files, [13, 11])})
    with pytest.raises(ValueError, match=f"{files[1]} holds 10 images and _info.json says 11"):
        build_dataset(DataSource("wds/x", tmp_path), "val")
    write_info(tmp_path, {"val": ([*files, "val-0002.tar"], [13, 10, 1])})
    with pytest.raises(FileNotFoundError, match="no shard .*val-0002.tar"):
        build_dataset(DataSource("wds/x", tmp_path), "val")
    write_info(tmp_path, {"val": (files, [13, 10])})
    data = build_dataset(DataSource("wds/x", tmp_path), "val")
    place = int(data.places["offset"][-1])
    second.write_bytes(whole[:place] + b"broken" + whole[place + 6 :])
    with pytest.raises(ValueError, match=r"cannot read image .*\(val\), record 22"):
        data[22]


@pytest.mark.parametrize(
    "names", [["0.png"], ["0.cls"], ["0.png", "0.json"], ["0.bmp", "0.cls"], ["0.cls", "1.png"]]
)
def test_incomplete_sample_is_named(names: list[str], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for name in names:
            data = b"1" if name.endswith("cls") else png()
            member = tarfile.TarInfo(f"some/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(
        ValueError, match="val.tar: sample some/0 needs an image .* and a class number in .cls"
    ):
        build_dataset(DataSource("wds/x", tmp_path), "val")


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_hidden_members_and_shards_are_no_data(tmp_path: Path) -> None:
    """As tar on macOS writes them: before, between and after a sample's own files."""
    with tarfile.open(tmp_path / "val-0.tar", "w") as tar:
        for name in ("./._0.png", "./0.png", "./._0.cls", "./0.cls", ".cache/1.png", "a/._1.png", "a/1.png"):
            add(tar, name, b"1" if name.endswith("cls") else png(len(name)))
        add(tar, "a/1.cls", b"0")
    for name in (".val-1.tar", "._val-0.tar", "val/._0.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no shard")
    assert read(build_dataset(DataSource("wds/x", tmp_path), "val")) == [(7, 1), (7, 0)]


def test_keys_of_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "adaptive-vit")
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for number in range(3):
            add(tar, f"{number}.left.png", png(number))
            add(tar, f"{number}.right.png", png(10 + number))
            add(tar, f"{number}.json", json.dumps({"kind": number - 1, "name": "x"}).encode())
    source = DataSource("wds/x", tmp_path, image_key="RIGHT.png;jpg", label_key="kind")
    assert read(build_dataset(source, "val", classes=["p", "q"])) == [(11, 0), (12, 1)]
    assert "left out: 1 without a class" in caplog.text
    assert "does not name its classes: their numbers are taken for the model's" in caplog.text
    there = r"has .left.png, .right.png, .json with the fields kind, name: see --image-key, --label-key"
    for keys in ({"label_key": "fine"}, {"image_key": "middle.png", "label_key": "kind"}):
        with pytest.raises(ValueError, match=there if "image_key" not in keys else "sample 0 needs .*middle"):
            build_dataset(source._replace(**{"image_key": "left.png"} | keys), "val")


# Hugging Face


@pytest.fixture
def tables():
    """The package, to make sets with."""
    if archives_missing():
        pytest.skip("the Hugging Face package is not installed")
    for name in ("main_deit", "dynamic_inference", "visualize"):  # these mean this project's module
        importlib.import_module(name)
    from loading.hugging_face import load_hugging_face, named_datasets

    with named_datasets(load_hugging_face()) as package:
        yield package


def test_parquet_folder(tables, numbered: Path, tmp_path: Path) -> None:
    """Images inside the table, class numbers without names."""
    folder = Folder(numbered / "val")
    images = [{"bytes": Path(path).read_bytes(), "path": None} for path, _ in folder.samples]
    columns = {"image": images, "label": [label for _, label in folder.samples]}
    features = tables.Features({"image": tables.Image(), "label": tables.Value("int64")})
    tables.Dataset.from_dict(columns, features).to_parquet(tmp_path / "validation.parquet")
    for data_set in ("hfds/", "hfds/parquet", f"hfds/{tmp_path}"):
        data = build_dataset(DataSource(data_set, tmp_path), "val")
        assert read(data) == read(folder) and data.classes == ["0", "1", "2"]
    with pytest.raises(ValueError, match='Unknown split "train"'):
        build_dataset(DataSource("hfds/", tmp_path), "train")


def test_tables_that_do_not_fit(tables, numbered: Path, tmp_path: Path) -> None:
    for name, columns, message in (
        ("words", {"image": [{"bytes": png(), "path": None}], "label": ["cat"]}, "must hold class numbers"),
        ("lists", {"image": [{"bytes": png(), "path": None}], "label": [[1]]}, "must hold class numbers"),
        (
            "none",
            {"image": [{"bytes": png(), "path": None}], "kind": [1]},
            "no column label but image, kind: name one with --label-key",
        ),
        (
            "other",
            {"picture": [{"bytes": png(), "path": None}], "label": [1]},
            "no column image but picture, label: name one with --image-key",
        ),
    ):
        (tmp_path / name).mkdir()
        kinds = {"words": tables.Value("string"), "lists": tables.List(tables.Value("int64"))}
        features = {"label": kinds.get(name, tables.Value("int64"))}
        features |= {column: tables.Image() for column in columns if column in ("image", "picture")}
        features = {column: features.get(column, tables.Value("int64")) for column in columns}
        table = tables.Dataset.from_dict(columns, tables.Features(features))
        table.to_parquet(tmp_path / name / "train.parquet")
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            build_dataset(DataSource("hfds/", tmp_path / name), "train")


def test_columns_of_other_names(
    tables, command: Command, folder: Path, trained: Path, tmp_path: Path
) -> None:
    """The flags of all commands; CIFAR-100 calls its columns img and fine_label."""
    data = Folder(folder / "val")
    images = [{"bytes": Path(path).read_bytes(), "path": None} for path, _ in data.samples]
    labels = [label for _, label in data.samples]
    columns = {"img": images, "fine_label": labels, "coarse_label": [label // 2 for label in labels]}
    kinds = [tables.Image(), tables.ClassLabel(names=data.classes), tables.Value("int64")]
    features = tables.Features(dict(zip(columns, kinds, strict=True)))
    tables.Dataset.from_dict(columns, features).to_parquet(tmp_path / "validation.parquet")
    source = DataSource("hfds/", tmp_path, image_key="img", label_key="fine_label")
    assert [label for _, label in build_dataset(source, "val")] == labels
    flags = ["--data-set", "hfds/parquet", "--data-path", tmp_path, "--device", "cpu", "--num_workers", 0]
    flags += ["--resume", trained / "checkpoint.pth", "--image-key", "img"]
    for name, *words in (
        ("main_deit", "--eval"),
        ("dynamic_inference", "--eval-mode", 0, "--results", tmp_path / "results.json"),
        ("visualize", "--output_dir", tmp_path / "pictures", "--num-images", 2),
    ):
        ended = command(name, *flags, *words, "--label-key", "fine_label")
        assert ended.code == 0, ended.err
        ended = command(name, *flags, *words)
        assert ended.code == 2 and "no column label but img, fine_label, coarse_label" in ended.err


@pytest.mark.parametrize("labels", [[0, -1], [0, None]])
def test_rows_without_a_class_are_told_at_once(tables, labels: list, tmp_path: Path) -> None:
    columns = {"image": [{"bytes": png(), "path": None}] * 2, "label": labels}
    for kind in (tables.Value("int64"), tables.ClassLabel(names=["a", "b"])):
        features = tables.Features({"image": tables.Image(), "label": kind})
        tables.Dataset.from_dict(columns, features).to_parquet(tmp_path / "test.parquet")
        with pytest.raises(
            ValueError, match=f"column label must hold class numbers .*not {labels[1]}: --label"
        ):
            build_dataset(DataSource("hfds/", tmp_path), "val")


def test_image_folder_of_the_package(tables, numbered: Path, tmp_path: Path) -> None:
    """It leaves out hidden entries by itself, and linked folders, which is an error here."""
    shutil.copytree(numbered, tmp_path / "in")
    for name in (".ipynb_checkpoints/0.png", "a/._0.png", "b/.x/0.png"):
        (tmp_path / "in" / "val" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / "val" / name).write_bytes(png())
    source = DataSource("hfds/imagefolder", tmp_path / "in")
    assert read(build_dataset(source, "val")) == read(Folder(numbered / "val"))
    (tmp_path / "in" / "val" / "d").symlink_to(numbered / "val" / "a")
    with pytest.raises(ValueError, match="does not follow linked folders such as .*val/d: --data-set IMNET"):
        build_dataset(source, "val")


def test_broken_image_is_named_not_replaced_by_the_next(tables, tmp_path: Path) -> None:
    columns = {
        "image": [{"bytes": data, "path": None} for data in (png(1), png(2)[:50], png(3), b"")],
        "label": [0, 1, 0, 1],
    }
    features = tables.Features({"image": tables.Image(), "label": tables.ClassLabel(names=["a", "b"])})
    tables.Dataset.from_dict(columns, features).to_parquet(tmp_path / "train.parquet")
    data = build_dataset(DataSource("hfds/", tmp_path), "train")
    assert [number(data[i][0]) for i in (0, 2)] == [1, 3]
    with pytest.raises(ValueError, match=r"record 3 \(it has no image\)"):
        data[3]
    with pytest.raises(ValueError, match=r"cannot read image .*\(train\), record 1 "):
        data[1]


def test_the_two_modules_called_datasets_stay_apart(
    source: DataSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = build_dataset(source, "val")
    assert sys.modules["datasets"] is datasets is __import__("datasets")
    assert Path(datasets.__file__).parent == ROOT
    if source.data_set.startswith("hfds"):
        from loading import hugging_face

        assert hugging_face.load_hugging_face() is not datasets
        monkeypatch.setattr(hugging_face, "named_datasets", lambda _: pytest.fail("swapped to read a row"))
        assert len(list(data)) == len(data)
