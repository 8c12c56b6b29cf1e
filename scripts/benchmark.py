"""Time any models, timm's and this project's, against a baseline: a table of speed and cost.

    python scripts/benchmark.py --models NAME NAME:KEY=VALUE,KEY=VALUE --batch-size 1 32 --csv speed.csv \
        --markdown speed.md --png speed.png
    python scripts/benchmark.py --list published --batch-size auto --amp bf16 --csv speed.csv
    python scripts/benchmark.py --loader --data-path IMAGENET/val --num_workers 10 --batch-size 256

Weights and images are random; the baseline's own row shows how far two measurements of the same differ.
"""

import _root as _root

import argparse
import csv
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tabulate import tabulate
from timm.models import model_entrypoint

import utils
from benchmarks import loading
from benchmarks.table import COLUMNS, EAGER, Bench, ModelSpec, Options, Row, title
from benchmarks.timing import dtype_name
from engine import Precision
from inference import streaming
from inference.session import add_precision
from models.registry import registered
from utils import NON_NEGATIVE, NON_NEGATIVE_INT, POSITIVE_INT, SHARE, InputError, Number, log

# What has no meaning where loading is timed, in which the model runs eagerly with all its stages.
NOT_LOADER = ("--png", "--train", "--compile", "--require-compiled", "--target-gflops", "--exit-share")
BASELINE = "deit_small_patch16_224"
# What Liang et al. 2022 (arXiv 2202.07800) timed their models against.
PUBLISHED = """
    swin_small_patch4_window7_224 swin_tiny_patch4_window7_224 tnt_s_patch16_224 tnt_b_patch16_224
    twins_pcpvt_small twins_pcpvt_base twins_svt_small twins_svt_base visformer_tiny visformer_small
    deit_small_patch16_224 deit_base_patch16_224 deit_base_patch16_384 cait_xxs24_224 cait_xxs24_384
    cait_xxs36_224 cait_xxs36_384 cait_s24_224 coat_tiny coat_mini coat_lite_tiny coat_lite_mini
    coat_lite_small convit_small convit_base nfnet_f0 efficientnet_b0 efficientnet_b1 efficientnet_b2
""".split()


def project_models() -> list[str]:
    """Return this project's models by their first names, without those of the embedded data set's size."""
    first_names: dict[object, str] = {}
    for name in registered:
        first_names.setdefault(model_entrypoint(name), name)  # aliases share it
    return [name for name in first_names.values() if not name.endswith("_nano")] + [BASELINE]


POSITIVE = Number(float, 1e-6)
LISTS = {"project": project_models(), "published": PUBLISHED}


def batch_size(text: str) -> int | str:
    """Read a number from 1 up, or "auto"."""
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text}: take numbers from 1 up, or auto")
    return text if text == "auto" else int(text)


def new_file(text: str) -> Path:
    """Read the path of a file to write.

    Raises:
        FileNotFoundError: its folder does not exist.
        OSError: it cannot be written.
    """
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: name a file in a folder that exists")
    utils.check_writable(path, "name another file")
    return path


def make_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="NAME or NAME:KEY=VALUE,... with constructor arguments; default: --list project",
    )
    add("--list", choices=LISTS, help="a list of models, before those of --models")
    add("--baseline", default=BASELINE, metavar="MODEL", help="what all others relate to")
    sizes = dict(nargs="+", type=batch_size, default=[32], metavar="N")
    add("--batch-size", **sizes, help="one or several; auto: what fits")
    add("--max-batch", type=POSITIVE_INT, help="limit of --batch-size auto; default: 4096 on a GPU")
    add("--img-size", type=POSITIVE_INT, help="side of the images in pixels; default: each model's own")
    share = "share of the images that leave at the first exit, the rest evenly at the others"
    add("--exit-share", type=SHARE, help=f"{share}; default: 0.78 of two exits, equal shares of more")
    add(
        "--target-gflops",
        type=POSITIVE,
        metavar="G",
        help="choose exit share or knob so that images cost this",
    )
    add("--loader", action="store_true", help="time loading instead, with the first model, and both together")
    add("--data-path", metavar="DIR", help="--loader: a folder with images; default: makes 200 JPEGs")
    workers = min(8, os.cpu_count() or 1)
    add("--num_workers", "--workers", type=NON_NEGATIVE_INT, default=workers, help="loading processes")
    utils.add_device(parser)
    add_precision(parser)
    streaming.add_compile(parser)
    add("--require-compiled", action="store_true", help="exit with 1 where a row was not compiled")
    add("--train", action="store_true", help="time training steps instead of inference")
    add("--threads", type=POSITIVE_INT, help="of the CPU; default: PyTorch's choice")
    add("--repeats", type=POSITIVE_INT, default=5, help="timed samples of each model")
    add("--seconds", type=NON_NEGATIVE, default=0.5, help="least length of a sample")
    add("--warmup", type=NON_NEGATIVE_INT, default=3, help="untimed batches")
    add("--seed", type=int, default=0, help="of weights and images")
    for flag, what in (("--csv", "all numbers"), ("--markdown", "the table"), ("--png", "speed over cost")):
        add(flag, type=new_file, metavar="FILE", help=f"write {what} here")
    return parser


def choose_models(name: str | None, further: list[str], default: list[str]) -> list[ModelSpec]:
    """Return the models of a list and further ones; of the list without those that timm has dropped.

    Args:
        name: of the list, or None.
        further: models as a command line names them.
        default: taken where neither is given.

    Raises:
        InputError: a further model is unknown.
    """
    listed = LISTS[name] if name else [] if further else default
    dropped = [text for text in listed if not timm.is_model(text.partition(":")[0])]
    if dropped:
        log.info("not in this version of timm: %s", ", ".join(dropped))
    return [ModelSpec.of(text) for text in [*listed, *further] if text not in dropped]


def draw(rows: list[Row], header: str, path: Path) -> None:
    """Draw images per second over GFLOPs, one colour per batch size."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot(xlabel="mean GFLOPs per image", ylabel="images per second")
    axes.set_title(header, fontsize=7)
    shown = [row for row in rows if row.get("gflops") and row.get("images_per_second")]
    for size in dict.fromkeys(row["batch_size"] for row in shown):
        points = [row for row in shown if row["batch_size"] == size]
        x, y = ([row[name] for row in points] for name in ("gflops", "images_per_second"))
        axes.scatter(x, y, label=f"batch {size}", alpha=0.8)
        for row, *at in zip(points, x, y, strict=True):
            name = title(row).rsplit(", ", 1)[0].removesuffix(", one exit")
            axes.annotate(name, at, (4, 4), textcoords="offset points", size=6)
    if shown:
        axes.set(xscale="log", yscale="log")
        axes.legend()
    axes.grid(alpha=0.3)
    utils.write_atomically(path, lambda temporary: FigureCanvasAgg(figure).print_png(temporary))


def as_markdown(rows: list[Row], header: str) -> str:
    """Return the header line and a table of the columns that are not empty."""
    columns = [name for name in COLUMNS if any(row.get(name) not in (None, "", False) for row in rows)]
    formats = [".1f" if "images" in name or "_m" in name else ".3f" for name in columns]
    cells = [[row.get(name) for name in columns] for row in rows]
    return f"{header}\n\n{tabulate(cells, columns, 'github', formats, missingval='')}\n"


def write_csv(rows: list[Row], path: Path, columns: list[str]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_tables(
    rows: list[Row], columns: list[str], table: str, to_csv: Path | None, to: Path | None
) -> None:
    """Write all numbers as CSV and the table itself to files, where these are given."""
    if to_csv:
        utils.write_atomically(to_csv, lambda path: write_csv(rows, path, columns))
    if to:
        utils.write_atomically(to, lambda path: path.write_text(table))


def measure_models(bench: Bench, specs: list[ModelSpec], sizes: list[int | str]) -> Iterator[list[Row]]:
    """Yield the rows of each model; no two are in memory at once."""
    for spec in specs:
        yield bench.rows(spec, sizes)
        gc.collect()  # a model that failed holds its memory in cycles
        torch.cuda.empty_cache()


def describe(precision: Precision, compile: str | None) -> str:
    """Return the line above a table: the machine, the versions, and how models run."""
    machine = dict.fromkeys([utils.device_name(precision.device), utils.cpu_name()])
    products = torch.get_float32_matmul_precision()
    return (
        f"{', '.join(machine)}, {torch.get_num_threads()} threads,"
        f" PyTorch {torch.__version__}, timm {timm.__version__}, {dtype_name(precision)},"
        f"{' weights cast once,' if precision.weights else ''}"
        f"{f' matmul precision {products},' if products != 'highest' else ''}"
        f" {f'compiled ({compile})' if compile else 'eager'}"
    )


def check_flags(args: argparse.Namespace) -> None:
    """Check what goes together.

    Raises:
        InputError: a flag would have no effect.
    """
    other = [flag for flag in NOT_LOADER if getattr(args, flag[2:].replace("-", "_"))]
    if args.loader and other:
        raise InputError(f"--loader takes no {' and no '.join(other)}")
    if args.loader and "auto" in args.batch_size:
        raise InputError("--loader takes --batch-size as numbers")
    if args.weights != "fp32" and (args.train or args.loader):
        raise InputError(f"--weights {args.weights} is for inference: not with --train or --loader")
    if args.require_compiled and not args.compile:
        raise InputError("--require-compiled: say how with --compile")
    if args.target_gflops and (args.exit_share is not None or args.train):
        raise InputError("--target-gflops chooses what --exit-share gives, and --train runs all stages")


def main() -> None:
    # Check what is asked for, before the first model is built.
    utils.start_logging(utils.Context(torch.device("cpu"), 0, 1))
    args = make_parser().parse_args()
    check_flags(args)
    default = [args.baseline] if args.loader else LISTS["project"]
    specs, baseline = choose_models(args.list, args.models, default), ModelSpec.of(args.baseline)
    context = utils.start(args.device, args.seed, args.require_cuda)
    if "auto" in args.batch_size and context.device.type != "cuda" and not args.max_batch:
        raise InputError(f"--batch-size auto on {context.device.type}: say how far with --max-batch N")
    # Say on what and how models run.
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    precision = Precision.inference(context.device, args.amp, args.weights)
    header = describe(precision, args.compile) + ("" if args.loader else f", baseline {args.baseline}")
    log.info(header)
    # Measure, and write what is asked for.
    if args.loader:
        options = loading.Options(args.num_workers, args.repeats, args.seconds)
        where = args.img_size, args.data_path, args.batch_size
        rows = loading.measure(specs[0], *where, precision, options)
        table = loading.as_markdown(rows, header)
        print(table, end="")
        return write_tables(rows, loading.COLUMNS, table, args.csv, args.markdown)
    given = {name: getattr(args, name) for name in Options._fields if getattr(args, name) is not None}
    bench = Bench(baseline, precision, Options(**given))
    bench.check_target(specs)
    rows: list[Row] = []
    for new in measure_models(bench, specs, args.batch_size):
        rows += new  # what is measured is kept, should the next model end the process
        write_tables(rows, COLUMNS, as_markdown(rows, header), args.csv, args.markdown)
    print(as_markdown(rows, header), end="")
    if args.png:
        draw(rows, header, args.png)
    if not any("images_per_second" in row for row in rows):
        raise utils.MainError("no model could be measured; the table says why")
    eager = [title(row) for row in rows if row.get("compiled") in (None, EAGER)]
    if args.require_compiled and eager:
        raise utils.MainError(f"not compiled: {'; '.join(eager)}; the lines above say why")


if __name__ == "__main__":
    utils.run_command(main)
