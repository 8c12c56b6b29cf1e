"""What the command lines share: flags of models, one-line errors, exit codes."""

import argparse
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from utils import STOPPED, MainError, Stopped


def run_command(main: Callable[[], None]) -> None:
    """Runs a command; bad input becomes one line on stderr and exit code 2, a failure of its own code 1."""
    name = Path(sys.argv[0]).name
    try:
        with loaders_closed():
            main()
    except (ValueError, OSError) as error:
        # A data loader's worker hands its exception on as a traceback: the last line says what happened.
        text = str(error).strip()
        line = (
            text.splitlines()[-1].split("Error: ", 1)[-1]
            if "Original Traceback" in text
            else " ".join(text.split())
        )
        print(f"{name}: error: {line}", file=sys.stderr)
        sys.exit(2)
    except MainError as error:
        print(f"{name}: failed: {error}", file=sys.stderr)
        sys.exit(1)
    except Stopped as stop:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{name}: {stop}", file=sys.stderr)
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def loaders_closed() -> Iterator[None]:
    """Ends the loading processes of a loader that an error leaves behind.

    The error refers to the loader and to itself. So Python would end these processes only at its exit, by a
    SIGTERM, which they ignore, and wait for them.
    """
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or "default:" in (action.help or ""):
            return action.help or ""
        return super()._get_help_string(action) or "default: %(default)s"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"formatter_class": Defaults} | kwargs)

    def parse_args(self, *args: Any, **kwargs: Any) -> argparse.Namespace:
        found = super().parse_args(*args, **kwargs)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            numbers = value if isinstance(value, (list, tuple)) else [value]
            if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
                self.error(f"{action.option_strings[0]} is {value}: take finite numbers")
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; --help lists what there is\n")


def block_numbers(text: str) -> list[int]:
    """Numbers from "3,6,9", "(3, 6, 9)" or "3"; nothing is evaluated."""
    try:
        return [int(number) for number in text.strip(" ()[]").rstrip(",").split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of block numbers such as 3,6,9") from error


# Constructor arguments that have flags of their own.
MODEL_FLAGS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "img_size": (
        ["--input-size", "--img-size"],
        dict(type=int, help="side of the images in pixels, for models that do not derive it"),
    ),
    "location_stage_size": (
        ["--location-stage-size"],
        dict(type=int, help="LF-ViT: side of the location grid in patches (7 or 9)"),
    ),
    "coarse_stage_size": (
        ["--coarse-stage-size"],
        dict(type=int, help="CF-ViT: side of the coarse grid in patches (7 or 9)"),
    ),
    "region_size": (["--region-size"], dict(type=int, help="LF-ViT: side of the region in location patches")),
    "alpha": (
        ["--alpha"],
        dict(type=float, help="share of the patches (LF-ViT: of the region's patches) that are refined"),
    ),
    "keep_rate": (
        ["--base_keep_rate", "--keep-rate"],
        dict(type=float, help="EViT: share of the patches that each dropping block keeps"),
    ),
    "drop_loc": (
        ["--drop_loc", "--drop-loc"],
        dict(type=block_numbers, help="EViT: numbers of the dropping blocks, from 0, as 3,6,9"),
    ),
    "fuse_token": (
        ["--fuse_token", "--fuse-token"],
        dict(action=argparse.BooleanOptionalAction, help="EViT: fuse dropped patches into one token"),
    ),
    "shrink_start_epoch": (
        ["--shrink_start_epoch", "--shrink-start-epoch"],
        dict(type=float, help="EViT: epoch from which training drops patches; default: from the first"),
    ),
    "shrink_epochs": (
        ["--shrink_epochs", "--shrink-epochs"],
        dict(type=float, help="EViT: epochs in which the keep rate then falls; default: at once"),
    ),
    "gate_scale": (
        ["--gate_scale", "--gate-scale"],
        dict(type=float, help="A-ViT: slope of the halting gate"),
    ),
    "gate_center": (
        ["--gate_center", "--gate-center"],
        dict(type=float, help="A-ViT: offset of the halting gate; less halts earlier"),
    ),
    "ponder_token_scale": (
        ["--ponder_token_scale", "--ponder-token-scale"],
        dict(type=float, help="A-ViT: weight of the mean depth of tokens in the loss"),
    ),
    "distr_prior_alpha": (
        ["--distr_prior_alpha", "--distr-prior-alpha"],
        dict(type=float, help="A-ViT: weight of the halting prior in the loss; 0 for none"),
    ),
}


def add_compile(parser: argparse.ArgumentParser) -> None:
    """Adds --compile for inference."""
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=("default", "reduce-overhead"),
        help="compile the stages with torch.compile; reduce-overhead: with CUDA graphs",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --model and everything that changes how a model is built."""
    parser.add_argument(
        "--model", metavar="NAME", help="registered model; default: the one the checkpoint names"
    )
    for name, (flags, options) in MODEL_FLAGS.items():
        parser.add_argument(*flags, dest=name, **options)
    parser.add_argument(
        "--model-kwargs",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="further constructor arguments of the model",
    )


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Constructor arguments that were given on the command line."""
    kwargs = {name: getattr(args, name) for name in MODEL_FLAGS if getattr(args, name) is not None}
    return kwargs | key_values("--model-kwargs", args.model_kwargs)


def key_values(flag: str, pairs: list[str]) -> dict[str, Any]:
    """Reads KEY=VALUE arguments; a value is JSON, or else a string."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{flag} takes KEY=VALUE, not {pair!r}")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def add_bad_images(parser: argparse.ArgumentParser) -> None:
    """Adds --max-bad-images, see images.BadImages."""
    parser.add_argument(
        "--max-bad-images",
        type=int,
        default=0,
        metavar="N",
        help="go on without so many images per split that cannot be read; they are counted, and listed in"
        " bad_images.txt",
    )


def add_device_normalize(parser: argparse.ArgumentParser) -> None:
    """Adds --device-normalize, see loaders.OnDevice."""
    parser.add_argument(
        "--device-normalize",
        action="store_true",
        help="move images as bytes, a quarter of what floats take, and normalise them on the device",
    )


def check_range(flag: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raises ValueError where a flag's value is outside low .. high."""
    if not low <= value <= high:
        limits = f"{low} to {high}" if high < float("inf") else f"at least {low}"
        raise ValueError(f"{flag} is {value}: take {limits}")
