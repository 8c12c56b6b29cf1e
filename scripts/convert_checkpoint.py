"""Turns a published checkpoint into this project's layout, or into safetensors. Nothing in it is ever run.

    python scripts/convert_checkpoint.py dvt_t2t_vit_12.pth.tar dvt.pth --model dvt_t2t_vit_12
    python scripts/convert_checkpoint.py small-10-75.pth avit.safetensors --model avit_deit_small
    python scripts/convert_checkpoint.py output/lf_7x7/checkpoint.pth lf.safetensors --use-ema

Takes the layouts of LF-ViT, CF-ViT, EViT, A-ViT, DVT, DeiT and timm, and safetensors. The weights have to be
the model's, name for name; to start one model from another's weights, give main_deit.py --finetune.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import command_line  # noqa: E402
import utils  # noqa: E402
from datasets import data_config  # noqa: E402
from models.cost import exit_gflops  # noqa: E402
from models.weights import model_from_checkpoint  # noqa: E402
from utils import log  # noqa: E402


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("input", metavar="INPUT", help="the checkpoint to convert")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="a new file, .pth or .safetensors")
    parser.add_argument("--use-ema", action="store_true", help="take the averaged weights")
    parser.add_argument("--classes", metavar="FILE", help="class names, one a line, in the model's order")
    command_line.add_model_arguments(parser)
    return parser


def class_names(file: str, count: int) -> list[str]:
    """Names from a text file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has another number of lines than the model has classes.
    """
    try:
        names = Path(file).read_text().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--classes {file} is no text file") from error
    if len(names) != count:
        raise ValueError(f"--classes {file} has {len(names)} lines, the model {count} classes")
    return names


def main() -> None:
    args = make_parser().parse_args()
    utils.start_logging(utils.start("cpu"))
    if args.output.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{args.output}: name a .pth or a .safetensors file")
    if args.output.exists():
        raise ValueError(f"{args.output} is there already: remove it or name another")
    found = utils.load_checkpoint(args.input)
    model, name, kwargs = model_from_checkpoint(
        found, args.input, args.model, command_line.model_arguments(args), args.use_ema
    )
    names = class_names(args.classes, model.num_classes) if args.classes else found.get("class_names")
    # What a published file says of itself stays, but its GFLOPs are those that this code runs.
    results = utils.Results.of(found)
    results.flops = exit_gflops(model)
    kept = {"model_name": name, "model_kwargs": kwargs, "data_config": data_config(model.recipe, found)}
    kept |= ({"class_names": names} if names else {}) | results.known()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    utils.save_checkpoint({"model": model.state_dict()} | kept, args.output)
    log.info("wrote %s: %s, %d classes, %s GFLOPs", args.output, name, model.num_classes, results.flops)


if __name__ == "__main__":
    command_line.run_command(main)
