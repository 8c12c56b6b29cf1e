"""Turns a published checkpoint into this project's layout, or into safetensors. Nothing in it is ever run.

    python scripts/convert_checkpoint.py dvt_t2t_vit_12.pth.tar dvt.pth --model dvt_t2t_vit_12
    python scripts/convert_checkpoint.py small-10-75.pth avit.safetensors --model avit_deit_small
    python scripts/convert_checkpoint.py output/lf_7x7/checkpoint.pth lf.safetensors --use-ema

Of weights and averaged weights it takes those that the best epoch was chosen by, unless told, and says which.
Takes the layouts of LF-ViT, CF-ViT, EViT, A-ViT, DVT, DeiT and timm, and safetensors. The weights have to be
the model's, name for name; to start one model from another's weights, give main_deit.py --finetune.
"""

from pathlib import Path

import _root as _root

import datasets
import utils
from checkpointing.format import Results, load_checkpoint, save_checkpoint
from inference.session import open_model
from models import flags
from models.cost import exit_gflops
from models.weights import WEIGHTS, chosen_weights
from utils import InputError, log


def make_parser() -> utils.Parser:
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("input", metavar="INPUT", help="the checkpoint to convert")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="a new file, .pth or .safetensors")
    flags.add_weights_flag(parser)
    datasets.add_config_arguments(parser)
    parser.add_argument("--classes", metavar="FILE", help="class names, one a line, in the model's order")
    flags.add_model_flags(parser)
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
    kwargs = flags.constructor_kwargs(vars(args))
    config = datasets.given_config(vars(args))
    trained = open_model(load_checkpoint(args.input), args.input, args.model, kwargs, args.use_ema, config)
    count = trained.model.num_classes
    names = class_names(args.classes, count) if args.classes else trained.class_names
    # What a published file says of the weights that are its own stays; its GFLOPs are those that this code runs.
    _, own = chosen_weights(trained.checkpoint, args.input)
    results = Results.of(trained.checkpoint if trained.weights == own else {})
    results.flops = exit_gflops(trained.model)
    keys = {"model": trained.model.state_dict(), "model_name": trained.name, "model_kwargs": trained.kwargs}
    keys |= {"data_config": trained.config} | ({"class_names": names} if names else {}) | results.known()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(keys, args.output)
    what = trained.name, WEIGHTS[trained.weights], count, results.flops
    log.info("wrote %s: %s, %s, %d classes, %s GFLOPs", args.output, *what)


if __name__ == "__main__":
    utils.run_command(main)
