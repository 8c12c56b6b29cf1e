"""Command-line flags of the models: those of constructor arguments, and KEY=VALUE for the rest."""

import argparse
import json
from typing import Any


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
