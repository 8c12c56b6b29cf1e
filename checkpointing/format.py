"""The layout of checkpoint and result files, and how they are read and written."""

import argparse
import dataclasses
import json
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
from torch import Tensor

from checkpointing.schema import CHECKPOINT, RESULTS, check
from utils import write_atomically


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
        """Reads the published keys; CF-ViT's files say `flop` where the others say `flops`.

        Raises:
            ValueError: a value is of another form.
        """
        found = {f.name: checkpoint.get(f.name) for f in dataclasses.fields(cls)}
        found["flops"] = checkpoint.get("flops", checkpoint.get("flop"))
        found = {key: as_lists(value) for key, value in found.items()}
        check(found, RESULTS, "stored results")
        return cls(**found)

    def cheapest(self, share: float) -> int:
        """Number of the first operating point with at least this share of the last exit's accuracy."""
        wanted = share * self.anytime_classification[-1]
        return next(i for i, found in enumerate(self.budgeted_batch_classification[1]) if found >= wanted)

    def known(self) -> dict[str, Any]:
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def as_lists(value: Any) -> Any:
    """Tensors and arrays as nested lists of numbers; anything else as it is."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.tolist()
    return [as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def save_checkpoint(
    checkpoint: dict[str, Any], path: Path, before: Callable[[], None] = lambda: None
) -> None:
    """Saves a checkpoint atomically; as .safetensors the weights and what JSON can hold beside them.

    `before`: see `write_atomically`.
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
    """Saves JSON atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


def load_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a JSON object.
    """
    try:
        found = json.loads(Path(path).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a JSON {type(found).__name__}, not an object of results")
    return found


HEADER = "adaptive_vit"  # entry of a safetensors header: all of a checkpoint but its weights, as JSON


def read_safetensors(path: Path) -> dict[str, Any]:
    """A state dict, or a whole checkpoint if `save_checkpoint` wrote the file."""
    with safe_open(path, "pt") as file:
        header = (file.metadata() or {}).get(HEADER)
    weights = load_file(path)
    return json.loads(header) | {"model": weights} if header else weights


def read_file(path: Path) -> dict[str, Any]:
    """A checkpoint file as it is; tensors on the CPU, no code run."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums, which torch.save makes
            with zipfile.ZipFile(path) as parts:
                if (part := parts.testzip()) is not None:
                    raise ValueError(f"the checksum of {part} is wrong")
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # published files keep their arguments so
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a broken file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is not a readable checkpoint ({reason[:150]})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a checkpoint")
    return found


def add_to_checkpoint(path: Path, values: dict[str, Any]) -> None:
    """Puts keys into a checkpoint file and leaves the others as they are.

    Raises:
        ValueError: the file has another layout than `model` plus other keys.
    """
    found = read_file(path)
    if not isinstance(found.get("model"), dict):
        raise ValueError(f"{path} takes no results (it has no key `model`): name a JSON file with --results")
    save_checkpoint(found | values, path)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint or a safetensors file without running any code it may hold.

    Returns:
        A dict with at least `model`, a state dict. Other layouts (`state_dict`, `model_state_dict`, a bare
        state dict) are turned into it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint, or needs more than tensors and plain values.
    """
    found = {key: value for key, value in read_file(Path(path)).items() if value is not None}
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(found.get(key), dict):
            averaged = found.get("model_ema", found.get("state_dict_ema"))
            extra = {"model_ema": clean_names(averaged)} if isinstance(averaged, dict) else {}
            checkpoint = found | {"model": clean_names(found[key])} | extra
            check(checkpoint, CHECKPOINT, str(path))
            return checkpoint
    if found and all(isinstance(value, Tensor) for value in found.values()):
        return {"model": clean_names(found)}
    raise ValueError(f"{path} holds no weights under model, state_dict or model_state_dict")


def clean_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes of DistributedDataParallel and torch.compile."""
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in state.items()}


def rng_state() -> dict[str, Any]:
    """State of every generator of this process, in types that a safe load accepts."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = (name, keys.tolist(), position, has_gauss, gauss)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Puts the generators back to a state of `rng_state`."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
