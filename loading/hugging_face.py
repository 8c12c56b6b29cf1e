"""Hugging Face data sets, opened with the Hugging Face package and read by index from their Arrow tables.

That package and this project's own module are both called `datasets`: see `named_datasets`.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import version
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from loading.archives import Archive
from loading.images import BadImageError
from utils import InputError


class HuggingFace(Archive):
    """A split of a Hugging Face data set with a column of images and one of class numbers.

    No code that comes with a set is run. Nothing is fetched for a set on disk.

    Args:
        name: of the set on the hub, or its folder, or a file format of FORMATS.
        root: where a set from the hub is kept; with a format, the folder of the set itself.
        splits: names of the split: the first that the set has.
        transform: from image to model input.
        classes: class names in the model's order.
        image_key, label_key: names of the two columns.

    Raises:
        FileNotFoundError: there is no such set.
        InputError: it has no such split or columns, classes that the model lacks, or the package that reads
            it is missing.
    """

    FORMATS = ("", "imagefolder", "parquet", "arrow")

    def __init__(
        self,
        name: str,
        root: Path,
        splits: list[str],
        transform: Callable | None = None,
        classes: list[str] | None = None,
        image_key: str = "image",
        label_key: str = "label",
    ):
        if name in self.FORMATS:
            if not root.is_dir():
                raise FileNotFoundError(f"no folder {root}")
            name = str(root.absolute())
        check_links(name)
        # A set on disk must not be cached in its own folder, which would then be read with it.
        self.name, self.cache_dir, self.splits = name, None if Path(name).is_dir() else str(root), splits
        self.image_key, self.label_key = image_key, label_key
        dataset = self.open()
        self.columns = self.columns_of(dataset)
        self.length = len(dataset)
        source = f"hfds/{name} ({splits[0]})"
        labels = self.columns[1]
        whole = str(labels.type).startswith(("int", "uint", "bool"))
        self.own_labels = labels.unique().to_pylist() if whole else []
        bad = [label for label in self.own_labels if label is None or label < 0]
        if bad or not self.own_labels:
            raise InputError(
                f"{source}: the column {label_key} must hold class numbers from 0 up, not"
                f" {bad[0] if bad else labels.type}: --label-key names another of"
                f" {', '.join(dataset.column_names)}"
            )
        names = getattr(dataset.features[label_key], "names", None)  # of a ClassLabel
        super().__init__(source, names or int(max(self.own_labels)) + 1, classes, transform)

    def open(self) -> Any:
        """Open the first of the splits that the set has, with image files left as they are."""
        with named_datasets(load_hugging_face()) as package:
            for split in self.splits:
                try:
                    dataset = package.load_dataset(self.name, split=split, cache_dir=self.cache_dir)
                    keys = {"--image-key": self.image_key, "--label-key": self.label_key}
                    for flag, key in keys.items():  # the cast would make a column of nulls
                        if key not in dataset.column_names:
                            there = ", ".join(dataset.column_names)
                            raise InputError(f"it has no column {key} but {there}: name one with {flag}")
                    dataset = dataset.cast_column(self.image_key, package.Image(decode=False))
                    if nulls := dataset.data.column(self.image_key).null_count:
                        raise InputError(f"{nulls} of its rows have nothing in the column {self.image_key}")
                    return dataset
                except FileNotFoundError:
                    raise
                except Exception as error:  # the package raises many kinds
                    if "Unknown split" not in str(error) or split == self.splits[-1]:
                        raise InputError(f"hfds/{self.name} ({split}) cannot be opened: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the table, so that a spawned worker opens its own."""
        return self.__dict__ | {"columns": None}

    def columns_of(self, dataset: Any) -> tuple[Any, Any]:
        """Return images and labels of a set as Arrow arrays, which need no code of the package."""
        return dataset.data.column(self.image_key), dataset.data.column(self.label_key)

    def labels(self) -> set[int]:
        return set(self.own_labels)

    def __len__(self) -> int:
        return self.length

    def record(self, index: int) -> tuple[bytes, int]:
        if self.columns is None:
            self.columns = self.columns_of(self.open())
        image, label = (column[index].as_py() for column in self.columns)
        try:
            return image["bytes"] or Path(image["path"]).read_bytes(), label
        except (TypeError, OSError) as error:  # neither bytes nor a file of that name
            raise BadImageError(f"{self.source}, record {index}", "it has no image") from error


def check_links(folder: str) -> None:
    """Raise InputError for a linked folder in that of a set: the package would leave it out silently."""
    for place, names, _ in os.walk(folder):
        names[:] = [name for name in names if not name.startswith(".")]
        for path in (os.path.join(place, name) for name in names):
            if os.path.islink(path):
                raise InputError(
                    f"hfds/ does not follow linked folders such as {path}: --data-set IMNET does"
                )


@contextmanager
def named_datasets(package: ModuleType) -> Iterator[ModuleType]:
    """Let `import datasets` mean the Hugging Face package inside, this project's own module outside.

    The package imports parts of itself by that name, some of them only when a set is opened. Its submodules
    stay in sys.modules as `datasets.*`, where this project has none.
    """
    own = sys.modules.get("datasets")
    sys.modules["datasets"] = package
    try:
        yield package
    finally:
        del sys.modules["datasets"]
        if own is not None:
            sys.modules["datasets"] = own


@cache
def load_hugging_face() -> ModuleType:
    """Import the package from anywhere but this project's folder, which comes first on the path.

    Raises:
        InputError: the package is not installed, or so old that it would run code of a data set.
    """
    here = Path(__file__).resolve().parent.parent
    spec = PathFinder.find_spec("datasets", [path for path in sys.path if Path(path).resolve() != here])
    if spec is None or int(version("datasets").split(".")[0]) < 4:
        raise InputError(
            "--data-set hfds/ needs the Hugging Face package datasets: pip install 'datasets>=4'"
        )
    package = module_from_spec(spec)
    with named_datasets(package):
        spec.loader.exec_module(package)
    if not sys.stderr.isatty():
        package.disable_progress_bars()
    return package
