"""Hugging Face data sets, read by index through timm's reader.

The package that reads them has the name of this project's module `datasets`: see `named_datasets`.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import version
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from timm.data.readers import create_reader

from loading.archives import Archive
from loading.images import BadImageError


class HuggingFace(Archive):
    """A split of a Hugging Face data set with the columns image and label, through timm's reader.

    No code that comes with a set is run. Nothing is fetched for a set on disk.

    Args:
        name: of the set on the hub, or its folder, or a file format of FORMATS.
        root: where a set from the hub is kept; with a format, the folder of the set itself.
        names: of the split: the first that the set has.
        transform: from image to model input.
        classes: class names in the model's order.

    Raises:
        FileNotFoundError: there is no such set.
        ValueError: it has no such split or columns, classes that the model lacks, or the package that reads
            it is missing.
    """

    FORMATS = ("", "imagefolder", "parquet", "arrow")

    def __init__(
        self,
        name: str,
        root: Path,
        names: list[str],
        transform: Callable | None = None,
        classes: list[str] | None = None,
    ):
        if name in self.FORMATS:
            if not root.is_dir():
                raise FileNotFoundError(f"no folder {root}")
            name = str(root.absolute())
        # A set on disk must not be kept in its own folder, which would then be read with it.
        self.place = dict(name=f"hfds/{name}", root=None if Path(name).is_dir() else str(root))
        self.splits, self.reader = names, None
        with hugging_face():
            reader = self.opened()
            known = list(reader.class_to_idx) or reader.dataset.unique(reader.label_key)
        self.length = len(reader)
        source = f"{self.place['name']} ({names[0]})"
        if not reader.class_to_idx:
            if not known or not all(isinstance(label, int) for label in known):
                raise ValueError(f"{source}: the column label must hold class numbers")
            known = max(known) + 1
        super().__init__(source, known, classes, transform)

    def opened(self) -> Any:
        """timm's reader; a process that has not inherited it opens its own."""
        if self.reader is None:
            self.reader = self.find()
        return self.reader

    def find(self) -> Any:
        for split in self.splits:
            try:
                reader = create_reader(**self.place, split=split)
                found = reader.dataset.column_names
                if reader.label_key not in found:
                    raise ValueError(f"it has no column {reader.label_key} but {', '.join(found)}")
                # A column of images that is not there has been made by the reader, with nothing in it.
                if without := reader.dataset.data.column(reader.image_key).null_count:
                    raise ValueError(f"{without} of its rows have nothing in the column {reader.image_key}")
                return reader
            except FileNotFoundError:
                raise
            except Exception as error:  # the package raises many kinds
                if "Unknown split" not in str(error) or split == self.splits[-1]:
                    raise ValueError(f"{self.place['name']} ({split}) cannot be opened: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        """Without the reader, whose classes a spawned worker would look for in this project's `datasets`."""
        return self.__dict__ | {"reader": None}

    def __len__(self) -> int:
        return self.length

    def record(self, index: int) -> tuple[bytes, int]:
        with hugging_face():
            try:
                file, label = self.opened()[index]
            except (AssertionError, OSError) as error:  # neither bytes nor a file of that name
                raise BadImageError(f"{self.source}, record {index}", "it has no image") from error
        with file:
            return file.read(), label


def hugging_face() -> AbstractContextManager[None]:
    """Inside, `import datasets` means the Hugging Face package, outside this project's module of that name.

    timm's reader and the package itself import it by that name, some of it only when a set is opened or an
    image read: the name has to mean the package whenever its code runs. Its submodules stay in sys.modules
    as `datasets.*`, where this project has none.

    Raises:
        ValueError: the package is not installed, or so old that it would run code of a data set.
    """
    return named_datasets(load_hugging_face())


@contextmanager
def named_datasets(module: ModuleType) -> Iterator[None]:
    own = sys.modules.get("datasets")
    sys.modules["datasets"] = module
    try:
        yield
    finally:
        del sys.modules["datasets"]
        if own is not None:
            sys.modules["datasets"] = own


@cache
def load_hugging_face() -> ModuleType:
    """Imports the package from anywhere but this project's folder, which comes first on the path."""
    here = Path(__file__).resolve().parent.parent
    spec = PathFinder.find_spec("datasets", [path for path in sys.path if Path(path).resolve() != here])
    if spec is None or int(version("datasets").split(".")[0]) < 4:
        raise ValueError(
            "--data-set hfds/ needs the Hugging Face package datasets: pip install 'datasets>=4'"
        )
    package = module_from_spec(spec)
    with named_datasets(package):
        spec.loader.exec_module(package)
    if not sys.stderr.isatty():
        package.disable_progress_bars()
    return package
