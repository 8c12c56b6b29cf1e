"""Values of knobs as the command line gives them, and the share of boxes that regions cover."""

from pathlib import Path

import pytest
import torch

from inference.evaluation import knob_values, read_boxes
from models import Adaptive, Knob


class Adjustable(Adaptive):
    knobs = {"count": Knob(int, 1, 9), "share": Knob(float, 0.5, 1.0)}


def test_values_have_the_type_of_their_knob() -> None:
    counts = knob_values(Adjustable(), "count", ["1", "9"])
    assert counts == [1, 9] and all(isinstance(count, int) for count in counts)
    assert knob_values(Adjustable(), "share", ["1", "0.5"]) == [1.0, 0.5]


@pytest.mark.parametrize(
    "name, texts, text",
    [
        ("count", ["2", "3.5"], "takes a name and whole numbers, not count 2 3.5"),
        ("share", ["x"], "takes a name and numbers, not share x"),
        ("count", ["10"], "--vary count 10: take whole numbers from 1 to 9"),
        ("share", ["0.4"], "--vary share 0.4: take numbers from 0.5 to 1.0"),
        ("share", ["nan"], "--vary share nan: take numbers"),
        ("rate", ["1"], "--vary rate: it takes count, share"),
    ],
)
def test_other_values_are_refused(name: str, texts: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        knob_values(Adjustable(), name, texts)
    with pytest.raises(ValueError, match="this model has nothing to vary"):
        knob_values(Adaptive(), name, texts)


def test_boxes_are_in_the_order_of_the_images(tmp_path: Path) -> None:
    file = tmp_path / "boxes.csv"
    file.write_text("file,left,top,right,bottom\na.png,1,2,3,4\nb/c.png,5,6,7,8\n")
    paths = [tmp_path / "b" / "c.png", tmp_path / "a.png"]
    assert torch.equal(read_boxes(file, tmp_path, paths), torch.tensor([[5.0, 6, 7, 8], [1, 2, 3, 4]]))
    with pytest.raises(ValueError, match="has no box for .*d.png"):
        read_boxes(file, tmp_path, [tmp_path / "d.png"])
    file.write_text("file,left\na.png,1\n")
    with pytest.raises(ValueError, match="needs the columns"):
        read_boxes(file, tmp_path, paths)
