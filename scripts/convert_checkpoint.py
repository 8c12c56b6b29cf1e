"""Turns a published checkpoint into this project's layout, or into safetensors. Nothing in it is ever run.

    python scripts/convert_checkpoint.py PUBLISHED.pth.tar converted.pth --model NAME
    python scripts/convert_checkpoint.py output/run/checkpoint.pth weights.safetensors --use-ema

Of weights and averaged weights it takes those that the best epoch was chosen by, unless told, and says which.
Takes the layouts that docs/migration.md names, those of DeiT and timm, and safetensors. The weights have to
be the model's, name for name; to start one model from another's weights, give main_deit.py --finetune.
"""

import _root as _root

from pathlib import Path

import datasets
import utils
from checkpointing.format import Results, load_checkpoint, origin, save_checkpoint
from inference.budgets import other_origin
from inference.session import open_model
from models import flags
from models.cost import exit_gflops
from utils import InputError, log


def make_parser() -> utils.Parser:
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("input", metavar="INPUT", help="the checkpoint to convert")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="a new file, .pth or .safetensors")
    datasets.add_config_arguments(parser)
    parser.add_argument("--classes", metavar="FILE", help="class names, one a line, in the model's order")
    flags.add_model_flags(parser)
    flags.add_use_ema(parser)
    return parser


def class_names(file: str, count: int) -> list[str]:
    """Names from a text file.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it has another number of lines than the model has classes.
    """
    try:
        names = Path(file).read_text().splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"--classes {file} is no text file") from error
    if len(names) != count:
        raise InputError(f"--classes {file} has {len(names)} lines, the model {count} classes")
    return names


def main() -> None:
    args = make_parser().parse_args()
    utils.start_logging(utils.start("cpu"))
    if args.output.suffix not in (".pth", ".safetensors"):
        raise InputError(f"{args.output}: name a .pth or a .safetensors file")
    if args.output.exists():
        raise InputError(f"{args.output} is there already: remove it or name another")
    utils.check_writable(args.output, "name another")
    kwargs = flags.constructor_kwargs(vars(args))
    config = datasets.given_config(vars(args))
    trained = open_model(load_checkpoint(args.input), args.input, args.model, kwargs, args.use_ema, config)
    count = trained.model.num_classes
    names = class_names(args.classes, count) if args.classes else trained.class_names
    # What a file says of these weights stays, but its GFLOPs are those that this code runs.
    other = other_origin(trained, trained.checkpoint)
    results = Results() if other else Results.of(trained.checkpoint)
    if other and Results.of(trained.checkpoint).known():
        log.warning("left out: results of %s", other)
    results.flops = exit_gflops(trained.model)
    keys = {"model": trained.model.state_dict(), "model_name": trained.name, "model_kwargs": trained.kwargs}
    keys |= {"data_config": trained.config} | ({"class_names": names} if names else {}) | results.known()
    if not other and (of := origin(trained.checkpoint)):
        keys["results_of"] = {**of, "weights": "model"}
        keys |= {key: trained.checkpoint[key] for key in ("device",) if key in trained.checkpoint}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(keys, args.output)
    told = trained.name, trained.which_weights(), count, results.flops
    log.info("wrote %s: %s, %s, %d classes, %s GFLOPs", args.output, *told)


if __name__ == "__main__":
    utils.run_command(main)
