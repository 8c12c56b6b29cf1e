"""The layout of checkpoint and result files, and how they are read and written."""

import argparse
import dataclasses
import hashlib
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
from utils import InputError, log, write_atomically


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
        """Return the number of the first operating point with this share of the last exit's accuracy.

        Raises:
            InputError: no point has it.
        """
        least = share * self.anytime_classification[-1]
        for number, accuracy in enumerate(self.budgeted_batch_classification[1]):
            if accuracy >= least:
                return number
        raise InputError(f"no stored point keeps {100 * share:g} % of the last exit's accuracy")

    def thresholds_at(self, point: int) -> list[float] | None:
        """Return an operating point's thresholds, one per early exit; None where there are none stored."""
        table, count = self.dynamic_threshold, len(self.budgeted_batch_classification[0])
        if table is None:  # files of earlier versions hold a sweep of 101 points without them
            return [point / 100] if count == 101 else None
        return table[point][: len(self.flops or table[point]) - 1] if len(table) == count else None

    def known(self) -> dict[str, Any]:
        """Return what was measured, by key."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def read_pair(val: dict[str, Any], test: dict[str, Any]) -> tuple[Results, Results]:
    """Read the results on two splits, of which one is to choose an operating point of the other.

    Raises:
        InputError: they are of different weights, or of different thresholds.
    """
    first, second = (origin(part).get("digest") for part in (val, test))
    if first and second and first != second:
        raise InputError("the results on val and on test are of different weights: evaluate both splits anew")
    results = Results.of(val), Results.of(test)
    if results[0].dynamic_threshold != results[1].dynamic_threshold:
        raise InputError("the results on val and on test are of different thresholds: evaluate both anew")
    return results


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
    write_atomically(path, lambda temporary: save_file(weights, temporary, header), before)


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


RESULT_KEYS = {*RESULTS, "flop", "results_of", "device"}
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


# What a checkpoint holds under these keys.
WEIGHTS = {"model": "raw weights", "model_ema": "averaged weights"}


def chosen_weights(
    checkpoint: dict[str, Any], use_ema: bool | None = None, source: str = "the checkpoint"
) -> str:
    """Return the key of a checkpoint's weights to use: the ones asked for, else those that were chosen.

    Args:
        checkpoint: from `load_checkpoint`; `best_weights` is the key of those that decided what is best, in
            files of earlier versions its arguments tell.
        use_ema: whether the averaged ones are asked for; None where nothing is.
        source: the file's name, for messages.

    Raises:
        InputError: the file lacks them.
    """
    if use_ema is None:
        args = checkpoint.get("args") if isinstance(checkpoint.get("args"), dict) else {}
        averaged = "model" not in checkpoint or (args.get("eval_ema") and "model_ema" in checkpoint)
        key = checkpoint.get("best_weights", "model_ema" if averaged else "model")
    else:
        key = "model_ema" if use_ema else "model"
    if key not in WEIGHTS:
        raise InputError(f"{source}: best_weights is {key!r}, not one of {', '.join(WEIGHTS)}")
    if checkpoint.get(key) is None:
        way = "take the averaged ones, with --use-ema" if key == "model" else "leave --use-ema out"
        raise InputError(f"{source} holds no {WEIGHTS[key]} ({key}); {way}")
    return key


def digest(weights: dict[str, Tensor]) -> str:
    """Return a checksum of weights: names, types, shapes and values, in any order."""
    total = hashlib.sha256()
    for name, value in sorted(weights.items()):
        total.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def merged(old: dict[str, Any], results: dict[str, Any], of: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a file's results with further ones; those of anything else are left out, which the log tells.

    Args:
        old: what the file holds; results that do not say what they are of are those of `model`.
        results: the new ones, by key.
        of: what they are of, see `TrainedModel.results_of`.
        path: the file's.
    """
    if (origin(old) != of) if origin(old) else of["weights"] != "model":
        if old.keys() & RESULTS.keys():
            log.warning("%s: its results of %s are replaced", path, described(origin(old)))
        old = {}
    elif "budgeted_batch_classification" in results:  # the thresholds of another curve
        old = {key: value for key, value in old.items() if key != "dynamic_threshold"}
    return old | results | {"results_of": of}


def origin(values: dict[str, Any]) -> dict[str, Any]:
    """Return what a file's results are of, {} where it does not say."""
    of = values.get("results_of")
    return of if isinstance(of, dict) else {}


def described(of: dict[str, Any]) -> str:
    """Return what results are of, as text."""
    return ", ".join(f"{key} {str(value)[:12]}" for key, value in of.items()) or "unnamed weights"


def add_to_json(path: Path, results: dict[str, Any], of: dict[str, Any]) -> None:
    """Put results into a JSON file; see `merged`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_json(merged(load_json(path) if path.exists() else {}, results, of, path), path)


def add_to_checkpoint(path: Path, results: dict[str, Any], of: dict[str, Any] | None = None) -> None:
    """Put results into a checkpoint file and leave its other keys as they are.

    Args:
        path: the file.
        results: by key.
        of: what they are of, see `merged`; None puts them in unseen.

    Raises:
        InputError: the file has another layout than `model` plus other keys, or no longer the weights that
            the results are of.
    """
    stamp = file_stamp(path)
    checkpoint = read_file(path)
    if not takes_results(checkpoint):
        raise InputError(f"{path} takes no results (it has no key `model`): name a JSON file with --results")
    if of:
        now = load_checkpoint(path)
        if digest(now.get(of["weights"], {})) != of["digest"]:
            epoch = f" of epoch {now['epoch']}" if "epoch" in now else ""
            raise InputError(f"{path} now holds other weights{epoch}, not those measured ({described(of)})")
        old = {key: checkpoint.pop(key) for key in RESULT_KEYS & checkpoint.keys()}
        results = merged(old, results, of, path)

    def check_unchanged() -> None:
        if file_stamp(path) != stamp:
            raise InputError(f"{path} was written by another process in the meantime")

    save_checkpoint(checkpoint | results, path, check_unchanged)


def takes_results(content: dict[str, Any]) -> bool:
    """Return whether a file, as `read_file` reads it, has a layout that other keys can join."""
    return any(isinstance(content.get(key), dict) for key in ("model", "model_ema"))


def file_stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes when a file is replaced; None where there is none."""
    if not path.exists():
        return None
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


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
