"""Tests of scripts/make_digits.py: what the data set promises, and how the command fails."""

import errno
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cases import contents, read_boxes
from PIL import Image
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import _image_set
import make_digits

COUNTS = {"train": 600, "val": 80, "test": 40}


def run(output: Path, *arguments: str, **counts: int) -> int:
    """Runs the command for a small set and returns its exit code."""
    options = [f"--{split}={count}" for split, count in (COUNTS | counts).items()]
    try:
        return make_digits.main([f"--output={output}", *options, *arguments])
    except SystemExit as end:
        return end.code


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set, made once by one worker."""
    output = tmp_path_factory.mktemp("made") / "digits"
    assert run(output, "--workers=1") == 0
    return output


@pytest.mark.slow
def test_workers_do_not_change_a_byte(made: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "digits", "--workers=3") == 0
    assert contents(tmp_path / "digits") == contents(made)


@pytest.mark.slow
def test_more_images_keep_the_earlier_ones_and_another_seed_does_not(made: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "more", train=0, test=0, val=90) == 0
    assert run(tmp_path / "other", "--seed=1", train=0, test=0, val=80) == 0
    more, other = contents(tmp_path / "more"), contents(tmp_path / "other")
    images = {name: data for name, data in contents(made).items() if name.startswith("val/")}
    assert len(images) == 80
    assert images.items() <= more.items()
    assert images.keys() <= other.keys() and all(other[name] != data for name, data in images.items())


def test_boxes_cover_every_file_and_lie_inside(made: Path) -> None:
    rows = read_boxes(made)
    assert [*rows[0]] == ["file", "label", "left", "top", "right", "bottom", "source"]
    assert sorted(row["file"] for row in rows) == sorted(
        name for name in contents(made) if name.endswith(".png")
    )
    assert Counter(row["file"].split("/")[0] for row in rows) == COUNTS
    for row in rows:
        left, top, right, bottom = (float(row[side]) for side in ("left", "top", "right", "bottom"))
        assert 0 <= left and 0 <= top and right <= 56 and bottom <= 56
        assert right - left == pytest.approx(bottom - top) and round(right - left, 2) in (7, 16)


def test_images_are_grey_rgb(made: Path) -> None:
    for row in read_boxes(made)[::20]:
        with Image.open(made / row["file"]) as image:
            assert (image.mode, image.size, image.format) == ("RGB", (56, 56), "PNG")
            assert np.ptp(np.asarray(image), axis=2).max() == 0


def test_labels_are_those_of_the_source_digits(made: Path) -> None:
    target = load_digits().target
    for row in read_boxes(made):
        assert row["file"].split("/")[1] == row["label"] == str(target[int(row["source"])])


def test_labels_are_balanced(made: Path) -> None:
    assert set(Counter(row["label"] for row in read_boxes(made)).values()) == {sum(COUNTS.values()) // 10}


def test_splits_share_no_source() -> None:
    splits = [make_digits.load_sources(split, 56) for split in ("train", "val", "test")]
    assert [len(sources.digits) for sources in splits] == [1100, 350, 347]
    assert sorted(np.concatenate([sources.numbers for sources in splits])) == list(range(1797))
    assert [[photo.shape for photo in sources.photos] for sources in splits] == [
        [(427, width)] * 2 for width in (320, 160, 160)
    ]
    assert max(photo.max() for sources in splits for photo in sources.photos) <= 0.25


def test_layout_is_free_of_overlap_and_half_small() -> None:
    rng = np.random.default_rng(0)
    layouts = [make_digits.lay_out(rng) for _ in range(3000)]
    assert {len(boxes) for boxes in layouts} == {2, 3, 4}
    sides = [box.side for boxes in layouts for box in boxes]
    assert sides.count(7) + sides.count(16) == len(sides)
    assert sides.count(7) / len(sides) == pytest.approx(0.5, abs=0.03)
    for boxes in layouts:
        covered = np.zeros((56, 56), int)
        for left, top, side in boxes:
            # Jitters of 0.5 px towards each other may make neighbours share one px, never more.
            left, top = round(left), round(top)
            covered[top + 1 : top + side - 1, left + 1 : left + side - 1] += 1
        assert covered.max() == 1


@pytest.mark.slow
def test_neither_order_nor_side_tells_the_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out, layouts = make_digits.lay_out, []
    monkeypatch.setattr(make_digits, "lay_out", lambda rng: layouts.append(lay_out(rng)) or layouts[-1])
    sources = make_digits.load_sources("train", 56)
    rng = np.random.default_rng(0)
    digits = [make_digits.draw_image(rng, sources, i % 10, 56)[1] for i in range(3000)]
    ranks = Counter(
        (len(boxes), boxes.index(digit)) for boxes, digit in zip(layouts, digits, strict=True)
    )  # (number of boxes, which of them)
    for (boxes, _), count in ranks.items():
        assert count == pytest.approx(1000 / boxes, rel=0.2)
    small = np.mean([box.side == 7 for boxes in layouts for box in boxes])
    assert np.mean([digit.side == 7 for digit in digits]) == pytest.approx(small, abs=0.04)


def test_fragments_are_no_digits() -> None:
    rng = np.random.default_rng(0)
    digit = rng.uniform(0.1, 1, size=(8, 8)).astype(np.float32)
    kinds = Counter()
    for _ in range(600):
        fragment = make_digits.draw_fragment(rng, digit)
        if fragment.shape == (5, 5):
            kinds["cut"] += 1
        elif (fragment == 0).any():
            kinds["half"] += 1
            assert np.count_nonzero(fragment) == 32 and np.isin(fragment[fragment > 0], digit).all()
        else:
            kinds["quarters"] += 1
            assert not (fragment == digit).any()
            assert sorted(fragment.flat) == sorted(digit.flat)
    assert all(150 < count < 250 for count in kinds.values()) and len(kinds) == 3


@pytest.mark.parametrize("size", [56, 224])
@pytest.mark.parametrize("n", [5, 8])
def test_render_fills_the_box(size: int, n: int) -> None:
    box = make_digits.Box(10.3, 24.6, 16)
    drawn = make_digits.render(np.ones((n, n)), box, np.radians(5), size, 56)
    assert drawn.shape == (size, size)
    y, x = (np.indices(drawn.shape) + 0.5) * 56 / size
    assert np.average(x, weights=drawn) == pytest.approx(18.3, abs=0.02)
    assert np.average(y, weights=drawn) == pytest.approx(32.6, abs=0.02)
    distance = np.maximum(abs(x - 18.3), abs(y - 32.6))  # 8 at the border of the box
    assert drawn[distance < 5.5].min() == pytest.approx(1)
    assert drawn[distance > 10.5].max() == 0
    assert drawn.sum() * (56 / size) ** 2 == pytest.approx(16**2, rel=0.02)


def test_larger_form_has_all_lengths_multiplied(made: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "digits", "--size=224", train=20, val=10, test=10) == 0
    small = {row["file"]: row for row in read_boxes(made)}
    for row in read_boxes(tmp_path / "digits"):
        for side in ("left", "top", "right", "bottom"):
            assert float(row[side]) == pytest.approx(4 * float(small[row["file"]][side]), abs=0.01)
        with Image.open(tmp_path / "digits" / row["file"]) as image:
            assert image.size == (224, 224)


def test_made_set_is_not_made_again(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in [made, *made.rglob("*")]}
    assert run(made, "--workers=2") == 0
    assert capsys.readouterr().out.startswith("already there")
    assert {path: path.stat().st_mtime_ns for path in [made, *made.rglob("*")]} == before


def test_other_arguments_do_not_replace_a_set(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(made)
    assert run(made, "--seed=1") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert contents(made) == before


def test_foreign_directory_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "digits.json").write_text("{}")
    assert run(tmp_path) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert contents(tmp_path) == {"thesis.txt": b"mine", "digits.json": b"{}"}


def test_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    assert run(tmp_path / "digits", train=10, val=10, test=10) == 0
    assert len(read_boxes(tmp_path / "digits")) == 30
    assert "CC BY" in (tmp_path / "digits" / "ATTRIBUTION.txt").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


@pytest.mark.parametrize(
    "bad", ["--train=-1", "--train=many", "--size=100", "--size=0", "--seed=-1", "--workers=0"]
)
def test_bad_arguments(bad: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "digits", bad) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and bad.split("=")[0] in message
    assert not any(tmp_path.iterdir())


def test_unwritable_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert run(tmp_path / "file" / "digits") == 2
    assert run(tmp_path / "file") == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "full"), 1), (OSError(errno.EACCES, "denied"), 2)],
)
def test_failure_leaves_nothing(
    error: BaseException, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(root: Path, *_: object) -> None:
        (root / "half.png").write_bytes(b"made")
        raise error

    monkeypatch.setattr(_image_set, "build", build)
    assert run(tmp_path / "digits") == code
    assert not any(tmp_path.iterdir())
