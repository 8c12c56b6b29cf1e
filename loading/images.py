"""Read image files of any kind as RGB, and keep count of those that cannot be read."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from utils import InputError, sum_over_ranks

log = logging.getLogger("adaptive-vit")
MAX_ASPECT = 500  # longer side over shorter: resizing the shorter one to model input would take gigabytes


class BadImageError(InputError):
    """Tell that an image cannot be read; a loading process passes only the message on.

    Attributes:
        line: name and reason, with a tab between them.
    """

    def __init__(self, name: str, reason: str = ""):
        self.line = f"{name}\t{reason}"
        hint = "repair or remove it, or allow for it with --max-bad-images"
        super().__init__(f"cannot read image {name} ({reason}); {hint}" if reason else name)


def load_image(file: str | Path | BinaryIO, name: str | None = None, side: int = 0) -> Image.Image:
    """Read an image of any kind that Pillow opens as RGB of 8 bits.

    CMYK is converted without a colour profile. Alpha and the transparency of palettes are dropped. 16-bit
    grey keeps its upper 8 bits, as Pillow keeps those of 16-bit colour. An animation gives its first frame.
    An orientation in EXIF is not applied, because the code behind published accuracies and weights does not
    read it.

    Args:
        file: what Pillow opens.
        name: of the image in errors; default: its path.
        side: least side in pixels that is needed: a larger JPEG may be decoded at a half, a quarter or an
            eighth of its size, with slightly other pixels than a resize gives. 0 for all pixels.

    Raises:
        BadImageError: the file is cut off or no image, has more pixels than Pillow's limit, or a shape or
            numbers that cannot be model input.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, which are not read
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return as_rgb(image, side)
    except MemoryError:
        raise
    except Exception as error:  # PIL raises many kinds of exception on a broken file
        unknown = isinstance(error, UnidentifiedImageError)  # whose text has an address in memory
        reason = "it is of no known format" if unknown else " ".join(str(error).split())
        raise BadImageError(
            " ".join(str(name or file).splitlines()), reason or type(error).__name__
        ) from error


def as_rgb(image: Image.Image, side: int) -> Image.Image:
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise InputError(f"its {image.width} x {image.height} pixels are a strip")
    if side:
        image.draft("RGB", (side, side))
    if image.mode == "F":
        raise InputError("its pixels are floating-point numbers of no known range")
    if image.mode.startswith("I"):  # 16 bits, in a mode of 16 or 32
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() >= 2**16:
            raise InputError("its pixels are 32-bit numbers of no known range")
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    return image.convert("RGB")


class BadImages:
    """Keep count of the images of a data set that cannot be read, in memory that loading processes share.

    Each image has a flag of its own, so nothing is counted twice and no lock is needed.

    Args:
        size: of the data set.
        limit: largest number of bad images.
        file: gets a line for each: its name, a tab, the reason. Without one they go to the log.
    """

    def __init__(self, size: int, limit: int = 0, file: Path | None = None):
        self.flags = torch.zeros(size, dtype=torch.bool)  # [size]
        if limit:
            self.flags.share_memory_()
        self.limit, self.file, self.reported = limit, file, 0

    def add(self, index: int, error: BadImageError) -> None:
        """Count an image as bad.

        Raises:
            BadImageError: there are now more than the limit.
        """
        if self.limit == 0:
            raise error
        if not self.flags[index]:
            self.flags[index] = True
            self.write(error.line)
            self.check(int(self.flags.sum()), f"; the last: {error.line.replace(chr(9), ': ')}")

    def write(self, line: str) -> None:
        line = line.encode(errors="backslashreplace").decode()
        if self.file is None:
            return log.warning("cannot be read: %s", line)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # Another process of a training run, or an earlier run, may have listed it.
        listed = self.file.read_text("utf-8").splitlines() if self.file.exists() else []
        if line not in listed:
            descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            with open(descriptor, "wb", buffering=0) as file:  # one write: lines do not mix
                file.write(f"{line}\n".encode())

    def check(self, count: int, detail: str = "") -> None:
        if count > self.limit:
            raise BadImageError(
                f"{count} images cannot be read and --max-bad-images is {self.limit}{detail or self.where()}"
            )

    def where(self) -> str:
        return f": {self.file}" if self.file else ""

    def report(self, device: torch.device) -> None:
        """Merge the flags of all processes, and log their number if it has changed since the last report.

        Args:
            device: of tensors that processes exchange; all processes have to call this.

        Raises:
            BadImageError: they are more than the limit, or all images.
        """
        if self.limit == 0:
            return
        flags = sum_over_ranks(self.flags.to(device, torch.int32)).cpu() > 0
        self.flags[flags] = True  # nothing is unset: loading processes may be at work
        count = int(flags.sum())
        self.check(count)
        if count and count == len(flags):
            raise BadImageError(f"none of the {count} images can be read{self.where()}")
        if count != self.reported:
            log.info("%d of %d images could not be read%s", count, len(flags), self.where())
            self.reported = count

    def numbers(self) -> list[int]:
        """Return the numbers of the bad images."""
        return self.flags.nonzero()[:, 0].tolist()

    def read(self, rank: int = 0, world_size: int = 1) -> Tensor:
        """Return the numbers of a process's images, in order, less the bad ones."""
        return rank + world_size * (~self.flags[rank::world_size]).nonzero()[:, 0]


class Readable(Dataset):
    """Give, in place of an image that cannot be read, the next one of the data set that can.

    The choice depends on the files alone, so batches and a resumed run stay what they are.
    """

    def __init__(self, dataset: Dataset, limit: int = 0, file: Path | None = None):
        self.dataset, self.bad = dataset, BadImages(len(dataset), limit, file)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        for step in range(len(self)):
            at = (index + step) % len(self)
            if not self.bad.flags[at]:
                try:
                    return self.dataset[at]
                except BadImageError as error:
                    self.bad.add(at, error)
        raise BadImageError(f"none of the {len(self)} images can be read{self.bad.where()}")
