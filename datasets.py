"""Name the data sets, open their splits and make the transforms of their images, whatever the method."""

import argparse
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100

from checkpointing.format import load_json
from loading.archives import Archive, Lmdb, Shards
from loading.classes import FORMS, class_numbers, read_classes
from loading.files import HIDDEN, IMAGE_ENDINGS, describe, list_folders, list_images, report
from loading.hugging_face import HuggingFace
from loading.images import load_image
from loading.token_labels import label_path, load_label
from utils import NON_NEGATIVE_INT, InputError, Number, log, values_given

DATA_SETS = ("IMNET", "CIFAR", "CIFAR10", "CIFAR100", "INAT", "INAT19")
INAT_CATEGORIES = ("name", "kingdom", "phylum", "class", "order", "supercategory", "family", "genus")

RESIZE = ("bilinear", "bicubic", "lanczos", "nearest")
# Preparation of model input, unless a checkpoint or the command line says otherwise.
DATA_CONFIG = dict(
    mean=list(IMAGENET_DEFAULT_MEAN), std=list(IMAGENET_DEFAULT_STD), crop_pct=0.875, interpolation="bicubic"
)


class Images(Dataset):
    """Read image files, each with a number; an item is (image, number).

    Args:
        samples: file and number of each image.
        transform: from image to model input.

    Attributes:
        side: see images.load_image.
    """

    side = 0

    def __init__(self, samples: list[tuple[str | Path, int]], transform: Callable | None = None):
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def present(self) -> set[int]:
        """Return the numbers that images have."""
        return {number for _, number in self.samples}

    def load(self, index: int) -> Image.Image:
        return load_image(self.samples[index][0], side=self.side)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.load(index)
        return (self.transform(image) if self.transform else image), self.samples[index][1]


class Folder(Images):
    """Read a tree with one folder per class; the number of an image is its class.

    Args:
        root: of the tree.
        transform: from image to model input.
        classes: class names in the model's order; default: the folders in sorted order.

    Raises:
        FileNotFoundError: there is no folder or no image, or a class has files and none of them is an image.
        InputError: a folder is none of the given classes.
    """

    def __init__(self, root: Path, transform: Callable | None = None, classes: list[str] | None = None):
        left_out: Counter[str] = Counter()
        folders = list_folders(root, left_out)
        if not folders:
            raise FileNotFoundError(
                f"no class folder in {root}; for a folder of images there is --val-labels FILE: {FORMS}"
            )
        numbers = class_numbers(root, folders, classes)
        self.root, self.classes, samples, empty = root, list(numbers), [], []
        for name in folders:
            own: Counter[str] = Counter()
            paths = list_images(os.path.join(root, name), own)
            samples += [(path, numbers[name]) for path in sorted(paths, key=os.path.split)]
            if not paths and own.keys() - {HIDDEN}:
                empty.append(f"{os.path.join(root, name)} ({describe(own)})")
            left_out += own
        if not samples or empty:
            raise FileNotFoundError(
                f"no image below {empty[0] if empty else root}: expected a folder per class with"
                f" {', '.join(IMAGE_ENDINGS)} files"
            )
        report(root, left_out)
        super().__init__(samples, transform)


class LabelledFolder(Images):
    """Read a folder of images without class folders, whose classes a file tells.

    Args:
        root: the folder.
        labels, synsets: see `classes.read_classes`.
        transform: from image to model input.
        classes: class names in the model's order; default: those of the images in sorted order.

    Raises:
        FileNotFoundError: there is no image, or no such file.
        InputError: there are class folders, or the classes of the images are not known.
    """

    def __init__(
        self,
        root: Path,
        labels: str,
        synsets: str | None = None,
        transform: Callable | None = None,
        classes: list[str] | None = None,
    ):
        left_out: Counter[str] = Counter()
        if folders := list_folders(root, Counter()):
            raise InputError(
                f"{root} has class folders, such as {folders[0]}: --val-labels is for a folder without them"
            )
        paths = list_images(root, left_out)
        if not paths:
            raise FileNotFoundError(f"no image in {root} ({describe(left_out)})")
        names = read_classes(labels, paths, classes, synsets)
        numbers = class_numbers(labels, sorted(set(names)), classes)
        self.root, self.classes = root, list(numbers)
        report(root, left_out)
        super().__init__([(path, numbers[name]) for path, name in zip(paths, names, strict=True)], transform)


class TokenLabelled(Dataset):
    """Read the images of a folder tree with their token labels.

    An item is the result of `transform(image, label)`, see token_labels.PairedTransform.

    Raises:
        InputError: there is no label, or they were made for other classes.
    """

    def __init__(self, folder: Folder, labels: str | Path, transform: Callable):
        record = Path(labels) / "labels.json"
        names = load_json(record).get("class_names") if record.is_file() else None
        if names and names != folder.classes:  # labels name classes by number
            raise InputError(
                f"{labels} holds token labels of other classes than {folder.root} has: make them again with"
                " scripts/make_token_labels.py"
            )
        self.folder, self.labels, self.classes, self.transform = folder, labels, folder.classes, transform
        self.label(0)  # raises at once where the folder is missing

    def __len__(self) -> int:
        return len(self.folder)

    def label(self, index: int) -> torch.Tensor:
        return load_label(label_path(self.labels, self.folder.samples[index][0]), len(self.classes))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return self.transform(self.folder.load(index), self.label(index))


class INaturalist(Images):
    """Read iNaturalist 2018 or 2019 by its JSON annotations.

    A class is a value of `category`. Its number is its place in `classes`, the model's, or by default that of
    its first appearance in the training annotations.
    """

    def __init__(
        self,
        root: Path,
        year: int,
        split: str,
        category: str,
        transform: Callable | None = None,
        classes: list[str] | None = None,
    ):
        files = [root / f"{part}{year}.json" for part in ("train", "train" if split == "train" else "val")]
        files.append(root / "categories.json")
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"no {file}: unpack the iNaturalist {year} annotations into {root}")
        with values_given(f"the annotations in {root} are not iNaturalist's"):
            train, own, categories = (json.loads(file.read_text()) for file in files)
            of_category = {entry["id"]: entry[category] for entry in categories}
            seen = dict.fromkeys(of_category[entry["category_id"]] for entry in train["annotations"])
        numbers = class_numbers(files[0], seen, classes)
        self.classes = list(numbers)
        trained = {number for number, name in of_category.items() if name in numbers}
        samples = []
        for image in own["images"]:
            parts = image["file_name"].split("/")  # split, kingdom, category id, file
            if int(parts[2]) not in trained:
                raise InputError(
                    f"{files[1]}: {image['file_name']} is of a class without a training annotation"
                )
            samples.append((root / parts[0] / parts[2] / parts[3], numbers[of_category[int(parts[2])]]))
        if samples and not samples[0][0].exists():  # the archives keep the kingdom in the path
            names = [image["file_name"] for image in own["images"]]
            samples = [(root / name, label) for name, (_, label) in zip(names, samples, strict=True)]
        super().__init__(samples, transform)


class Files(Images):
    """Read unlabelled pictures, a file or every image below a folder; the number of an image is its index."""

    def __init__(self, path: str | Path, transform: Callable | None = None):
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no image or folder at {path}")
        left_out: Counter[str] = Counter()
        self.paths = [path] if path.is_file() else sorted(map(Path, list_images(path, left_out)))
        if not self.paths:
            raise FileNotFoundError(f"no image below {path} ({describe(left_out) or 'nothing is there'})")
        report(path, left_out)
        super().__init__([(path, index) for index, path in enumerate(self.paths)], transform)

    def in_original(self, index: int, box: list[int], img_size: int, config: dict[str, Any]) -> list[int]:
        """Map left, top, right, bottom in model input to pixels of the picture on disk."""
        with Image.open(self.paths[index]) as image:
            sides = image.size
        scale = min(sides) / math.floor(img_size / config["crop_pct"])  # of eval_transform's resize
        offsets = [(side / scale - img_size) / 2 for side in sides]
        moved = [(value + offsets[at % 2]) * scale for at, value in enumerate(box)]
        return [round(min(max(value, 0), sides[at % 2])) for at, value in enumerate(moved)]


class DataSource(NamedTuple):
    """Tell where labelled images come from.

    Attributes:
        data_set: one of DATA_SETS; IMNET is any folder tree root/split/class/image, CIFAR is CIFAR-100. Or
            wds/NAME, hfds/NAME as timm.data.create_dataset takes them.
        root: the data folder, for archives as archives.Shards and hugging_face.HuggingFace take it.
        category: iNaturalist: the level of the taxonomy that is the class.
        use_lmdb: IMNET: read root/split.lmdb instead of the folders.
        download: CIFAR: fetch it if it is not there.
        image_key, label_key: see archives.Shards and hugging_face.HuggingFace; None for their defaults.
        val_labels, val_synsets: IMNET: see `LabelledFolder`, for other splits than train; None for class
            folders.
    """

    data_set: str
    root: str | Path
    category: str = "name"
    use_lmdb: bool = False
    download: bool = False
    image_key: str | None = None
    label_key: str | None = None
    val_labels: str | None = None
    val_synsets: str | None = None

    @classmethod
    def of(cls, args: argparse.Namespace, root: str | Path) -> "DataSource":
        """Read the flags of `add_data_arguments`."""
        names = ("image_key", "label_key", "val_labels", "val_synsets")
        further = {name: getattr(args, name) for name in names}
        return cls(args.data_set, root, args.inat_category, args.use_lmdb, **further)

    def check(self) -> None:
        """Raise InputError where the data set does not read what is set."""
        tree, archive = self.data_set == "IMNET", self.data_set.startswith(("wds/", "hfds/"))
        archives = "--data-set wds/NAME or hfds/NAME"
        for flag, value, fits, partner in (
            ("--use-lmdb", self.use_lmdb, tree, "--data-set IMNET"),
            ("--inat-category", self.category != "name", self.data_set.startswith("INAT"), "--data-set INAT"),
            ("--image-key", self.image_key, archive, archives),
            ("--label-key", self.label_key, archive, archives),
            ("--val-labels", self.val_labels, tree and not self.use_lmdb, "--data-set IMNET, not --use-lmdb"),
            ("--val-synsets", self.val_synsets, self.val_labels, "--val-labels"),
        ):
            if value and not fits:
                raise InputError(f"{flag} goes with {partner}; --data-set is {self.data_set}")


def build_dataset(
    source: DataSource,
    split: str,
    transform: Callable | None = None,
    classes: list[str] | None = None,
) -> Dataset:
    """Open one split of a data set, with its class names as `classes`.

    Args:
        source: the data set and its folder.
        split: "train", "val" or another folder name; `validation` and `test` stand in for a missing `val`.
        transform: from image to model input.
        classes: class names in the model's order, whatever the split; default: the folders in sorted order,
            or the data set's own.

    Raises:
        FileNotFoundError: the folder, the split or its images are not there.
        InputError: the data set is unknown, or has a class that is not among the given ones, or an archive
            cannot be read, or the source sets what the data set does not read.
    """
    source.check()
    if Path(split).name.startswith("."):
        raise InputError(f"the split {split} begins with a dot: such names are no data")
    dataset = open_split(source, split, transform, classes)
    if split == "train" and isinstance(dataset, (Images, Archive)):  # CIFAR has images of all classes
        report_absent_classes(dataset)
    return dataset


def report_absent_classes(dataset: Images | Archive) -> None:
    """Log in one line which classes have no image in a training set, if any."""
    present = dataset.present()
    absent = [name for number, name in enumerate(dataset.classes) if number not in present]
    if absent:
        names = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
        log.info("%d of %d classes have no training image: %s", len(absent), len(dataset.classes), names)


def open_split(
    source: DataSource, split: str, transform: Callable | None, classes: list[str] | None
) -> Dataset:
    """Do what `build_dataset` does, but for its checks."""
    data_set, root = source.data_set, Path(source.root)
    splits = [split] + (["validation", "test"] if split == "val" else [])
    kind, _, name = data_set.partition("/")
    if source.use_lmdb:
        files = [root / f"{split}.lmdb" for split in splits]
        return Lmdb(next((file for file in files if file.is_file()), files[0]), transform, classes)
    if kind == "wds":
        return Shards(root, splits, transform, classes, source.image_key, source.label_key)
    if kind == "hfds":
        keys = source.image_key or "image", source.label_key or "label"
        return HuggingFace(name, root, splits, transform, classes, *keys)
    if data_set == "IMNET":
        folders = [root / split for split in splits if (root / split).is_dir()]
        if not folders:
            raise FileNotFoundError(
                f"no folder {root / split}: the data folder needs one folder per class in it"
            )
        if source.val_labels and split != "train":
            return LabelledFolder(folders[0], source.val_labels, source.val_synsets, transform, classes)
        return Folder(folders[0], transform, classes)
    if split not in ("train", "val", "validation", "test"):
        raise InputError(f"{data_set} has no split {split!r} but train and val")
    if data_set in ("CIFAR", "CIFAR10", "CIFAR100"):
        cifar = CIFAR10 if data_set == "CIFAR10" else CIFAR100
        try:
            data = cifar(str(root), train=split == "train", transform=transform, download=source.download)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"no {cifar.__name__} below {root}: unpack it there or add --download"
            ) from error
        if classes and classes != data.classes:
            raise InputError(f"the model's classes are not those of {cifar.__name__} in its order")
        return data
    if data_set in ("INAT", "INAT19"):
        year = 2018 if data_set == "INAT" else 2019
        return INaturalist(root, year, split, source.category, transform, classes)
    raise InputError(f"unknown data set {data_set!r}: take one of {', '.join(DATA_SETS)}")


def check_classes(dataset: Dataset, num_classes: int) -> None:
    """Raise InputError where the classes of a data set cannot be those of a model.

    Where a checkpoint names its classes, `build_dataset` has given them to the data set, however few of them
    the folders hold.
    """
    if len(dataset.classes) != num_classes:
        raise InputError(
            f"the data has {len(dataset.classes)} classes and the model {num_classes}, and the checkpoint"
            " does not name its classes: the folders must be all of them"
        )


# Transforms


def data_config(recipe: dict[str, Any], checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the preparation of a model's images: its checkpoint's over its recipe's over DATA_CONFIG."""
    own = {key: value for key, value in recipe.items() if key in DATA_CONFIG}
    return DATA_CONFIG | own | (checkpoint.get("data_config") or {})


def describe_config(config: dict[str, Any]) -> str:
    """Return a data config as a log shows it."""
    values = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in config.items()}
    return ", ".join(f"{name} {' '.join(map(str, value))}" for name, value in values.items())


def eval_transform(img_size: int, config: dict[str, Any]) -> Callable:
    """Make timm's transform: shorter side to img_size / crop_pct, centre crop, normalisation."""
    return make_transform(img_size, is_training=False, **config)


def train_transform(img_size: int, config: dict[str, Any], **augmentation: Any) -> Callable:
    """Make timm's training transform; `augmentation` are arguments of timm.data.create_transform."""
    config = {key: config[key] for key in ("mean", "std")}
    return make_transform(img_size, is_training=True, **config, **augmentation)


def make_transform(img_size: int, **options: Any) -> Callable:
    """Make timm's transform; raise InputError for options that timm refuses."""
    named = ", ".join(f"{name} {value}" for name, value in options.items() if isinstance(value, str))
    with values_given(f"timm makes no transform of {named}"):
        return create_transform(img_size, **options)


# Command-line flags


def data_set_name(text: str) -> str:
    """Check a value of --data-set, as a type of argparse."""
    if text in DATA_SETS or text.startswith(("wds/", "hfds/")):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(DATA_SETS)}, wds/NAME, hfds/NAME")


def add_data_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the flags of a `DataSource`, its folder apart."""
    names = f"{', '.join(DATA_SETS)}, wds/NAME or hfds/NAME; IMNET is any tree of class folders"
    parser.add_argument("--data-set", default="IMNET", type=data_set_name, metavar="NAME", help=names)
    lmdb = "read DIR/SPLIT.lmdb, see scripts/folder2lmdb.py"
    parser.add_argument("--use-lmdb", action="store_true", help=lmdb)
    parser.add_argument("--inat-category", default="name", choices=INAT_CATEGORIES)
    image = "hfds/: column of the images, default: image; wds/: their endings, default: jpg;jpeg;png;webp"
    parser.add_argument("--image-key", metavar="NAME", help=image)
    label = "hfds/: column of the class numbers, default: label; wds/: their field in .json, default: .cls"
    parser.add_argument("--label-key", metavar="NAME", help=label)
    add_val_labels(parser)


def add_val_labels(parser: argparse._ActionsContainer) -> None:
    """Add the flags of a `LabelledFolder`."""
    labels = f"classes of the images in a folder val without class folders: {FORMS}"
    parser.add_argument("--val-labels", metavar="FILE", help=labels)
    synsets = "meta.mat, or lines 'number class': the classes that the numbers of --val-labels mean"
    parser.add_argument("--val-synsets", metavar="FILE", help=synsets)


def add_config_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the flags of a data config, see DATA_CONFIG; not given, they are None."""
    add, whose = parser.add_argument, "default: the checkpoint's, else the model's"
    share = "share of an evaluation image that is kept"
    add("--crop-pct", type=Number(float, 0.01, 1), help=f"{share}; {whose}, else 0.875")
    add("--interpolation", choices=RESIZE, help=f"of the evaluation images; {whose}, else bicubic")
    add("--mean", type=float, nargs=3, help=f"of the channels; {whose}, else ImageNet's")
    add("--std", type=Number(float, 1e-6), nargs=3, help=f"of the channels; {whose}, else ImageNet's")


def given_config(values: dict[str, Any]) -> dict[str, Any]:
    """Return what of a data config was given on a command line with `add_config_arguments`."""
    return {key: values[key] for key in DATA_CONFIG if values[key] is not None}


def add_bad_images(parser: argparse._ActionsContainer) -> None:
    """Add --max-bad-images, see images.BadImages."""
    parser.add_argument(
        "--max-bad-images",
        type=NON_NEGATIVE_INT,
        default=0,
        metavar="N",
        help="go on without so many images per split that cannot be read; they are counted, and listed in"
        " bad_images.txt",
    )


def add_device_normalize(parser: argparse._ActionsContainer) -> None:
    """Add --device-normalize, see loaders.DeviceLoader."""
    parser.add_argument(
        "--device-normalize",
        action="store_true",
        help="move images as bytes, a quarter of what floats take, and normalise them on the device",
    )
