"""The layout of checkpoint and result files, and how they are read and written."""

import argparse
import dataclasses
import json
import pathlib
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import clean_state_dict
from torch import Tensor

from checkpointing.schema import CHECKPOINT, RESULTS, check
from utils import InputError, write_atomically


@dataclasses.dataclass
class Results:
    """What inference measures; the names are the keys of published checkpoints.

    Attributes:
        flops: cumulative GFLOPs (multiply-adds) of leaving at each exit.
        anytime_classification: top-1 accuracy in percent when all images leave at each exit.
        budgeted_batch_classification: mean GFLOPs and top-1 accuracy in percent, one of each per operating
            point.
        dynamic_threshold: thresholds per operating point.
    """

    flops: list[float] | None = None
    anytime_classification: list[float] | None = None
    budgeted_batch_classification: list[list[float]] | None = None
    dynamic_threshold: list[list[float]] | None = None

    @classmethod
    def of(cls, checkpoint: dict[str, Any]) -> "Results":
        """Read the published keys, of which `flops` is also spelt `flop`.

        Raises:
            InputError: a value is of another form.
        """
        values = {"flops": checkpoint.get("flop")} | checkpoint
        values = {key: as_lists(values[key]) for key in RESULTS if values.get(key) is not None}
        check(values, RESULTS, "stored results")
        return cls(**values)

    def cheapest(self, share: float) -> int:
        """Return the number of the first operating point with this share of the last exit's accuracy."""
        least = share * self.anytime_classification[-1]
        accuracies = enumerate(self.budgeted_batch_classification[1])
        return next(number for number, accuracy in accuracies if accuracy >= least)

    def known(self) -> dict[str, Any]:
        """Return what was measured, by key."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def as_lists(value: Any) -> Any:
    """Return tensors and arrays as nested lists of numbers, and anything else as it is."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.tolist()
    return [as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def save_checkpoint(
    checkpoint: dict[str, Any], path: Path, before: Callable[[], None] = lambda: None
) -> None:
    """Save a checkpoint atomically; as .safetensors the weights and what JSON can hold beside them.

    Args:
        checkpoint: weights under `model`, and anything else.
        path: the file.
        before: see `write_atomically`.
    """

    def write(temporary: Path) -> None:
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:  # a full disk: the zip writer hides the reason
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    if path.suffix != ".safetensors":
        return write_atomically(path, write, before)
    weights = {name: value.contiguous() for name, value in checkpoint["model"].items()}
    header = {HEADER: json.dumps({key: value for key, value in checkpoint.items() if key != "model"})}
    write_atomically(path, lambda temporary: save_file(weights, temporary, header))


def save_json(value: Any, path: Path) -> None:
    """Save JSON atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


def load_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is not a JSON object.
    """
    try:
        value = json.loads(Path(path).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a JSON file ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, not an object of results")
    return value


HEADER = "adaptive_vit"  # entry of a safetensors header: all of a checkpoint but its weights, as JSON


def read_safetensors(path: Path) -> dict[str, Any]:
    """Read a state dict, or a whole checkpoint if `save_checkpoint` wrote the file."""
    with safe_open(path, "pt") as file:
        header = (file.metadata() or {}).get(HEADER)
    weights = load_file(path)
    return json.loads(header) | {"model": weights} if header else weights


class NumpyType:
    """Stand in for numpy.dtype in a file; the real one takes a state that may point anywhere in memory."""

    def __init__(self, code: str, *_: object):
        if not re.fullmatch(r"[<>|]?[biufUS]\d+", code):
            raise TypeError(f"no number or text: numpy type {code}")
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.__init__(state[1] + self.code.lstrip("<>|"))  # a byte order

    def __reduce__(self) -> tuple:
        return np.dtype, (self.code,)


def numpy_scalar(kind: NumpyType, data: bytes) -> Any:
    """Return a NumPy number or text of a file as Python's own."""
    return np.frombuffer(data, kind.code, 1)[0].item()


# What a file may call besides tensors and plain values; published files hold their command line.
HARMLESS = [argparse.Namespace, (NumpyType, "numpy.dtype")]
HARMLESS += [(numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
for module in ("pathlib", "pathlib._local"):  # the second is Python 3.13's
    for system in ("Posix", "Windows"):
        pure = getattr(pathlib, f"Pure{system}Path")
        HARMLESS += [(pure, f"{module}.{name}") for name in (f"{system}Path", f"Pure{system}Path")]


def reason_of(error: Exception) -> str:
    """Return why torch.load or safetensors did not read a file, in one plain line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split("WeightsUnpickler error: ")[-1].strip()
    if blocked := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it holds {blocked[1]}, and only tensors and plain values are read: save its weights alone"
    return re.split(r"\n|\. ", text)[0][:150] if text else type(error).__name__  # what follows is advice


def read_file(path: Path) -> dict[str, Any]:
    """Read a checkpoint file as it is: tensors on the CPU, no code run.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it cannot be read, or needs more than tensors and plain values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums, which torch.save makes
            with zipfile.ZipFile(path) as parts:
                if (part := parts.testzip()) is not None:
                    raise InputError(f"the checksum of {part} is wrong")
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a broken file
        raise InputError(f"{path} is not a readable checkpoint ({reason_of(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def add_to_checkpoint(path: Path, values: dict[str, Any]) -> None:
    """Put keys into a checkpoint file and leave the others as they are.

    Raises:
        InputError: the file has another layout than `model` plus other keys.
    """
    checkpoint = read_file(path)
    if not isinstance(checkpoint.get("model"), dict):
        raise InputError(f"{path} takes no results (it has no key `model`): name a JSON file with --results")
    save_checkpoint(checkpoint | values, path)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint or a safetensors file without running any code it may hold.

    Returns:
        A dict with at least `model` or `model_ema`, a state dict. Other layouts (`state_dict`,
        `model_state_dict`, `state_dict_ema`, a bare state dict) are turned into these, and keys without a
        value are left out.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file is not a checkpoint, or needs more than tensors and plain values.
    """
    content = {key: value for key, value in read_file(Path(path)).items() if value is not None}
    if content and all(isinstance(value, Tensor) for value in content.values()):
        content = {"model": content}
    if isinstance(content.get("state_dict_ema"), dict):
        content.setdefault("model_ema", content["state_dict_ema"])
    for key in ("model", "state_dict", "model_state_dict", "model_ema"):
        if isinstance(content.get(key), dict):
            checkpoint = content | ({} if key == "model_ema" else {"model": content[key]})
            check(checkpoint, CHECKPOINT, str(path))
            weights = checkpoint.keys() & {"model", "model_ema"}
            return checkpoint | {name: clean_state_dict(checkpoint[name]) for name in weights}
    names = "model, state_dict, model_state_dict, model_ema or state_dict_ema"
    raise InputError(f"{path} holds no weights under {names}")


def rng_state() -> dict[str, Any]:
    """Return the state of every generator of this process, in types that a safe load accepts."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = (name, keys.tolist(), position, has_gauss, gauss)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Put the generators back to a state of `rng_state`."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
