"""Times any models, timm's and this project's, against a baseline: a table of speed and cost.

    python scripts/benchmark.py --models lf_deit_small evit_deit_small:keep_rate=0.5 deit_small_patch16_224 \
        --batch-size 1 32 --csv speed.csv --markdown speed.md --png speed.png
    python scripts/benchmark.py --list published --batch-size auto --amp bf16 --csv speed.csv
    python scripts/benchmark.py --loader --data-path IMAGENET/val --num_workers 10 --batch-size 256

Weights and images are random; the baseline's own row shows how far two measurements of the same differ.
"""

import argparse
import csv
import gc
import os
from pathlib import Path

import _root as _root
import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tabulate import tabulate

import utils
from benchmarks import loading as loader_speed
from benchmarks.table import COLUMNS, Bench, Options, Row, Spec, title
from benchmarks.timing import cpu_name, device_name, dtype_name
from engine import Precision
from inference import streaming
from utils import log

LISTS = {
    "project": """
        lf_deit_small lf_deit_small:location_stage_size=9 cf_deit_small cf_deit_small:coarse_stage_size=9
        cf_lvvit_small evit_deit_small evit_deit_small:keep_rate=0.5 evit_deit_base avit_deit_tiny
        avit_deit_small dvt_deit_small dvt_t2t_vit_12 dvt_t2t_vit_14 deit_small_patch16_224
    """.split(),
    # What EViT's authors timed theirs against (Liang et al. 2022, arXiv 2202.07800).
    "published": """
        swin_small_patch4_window7_224 swin_tiny_patch4_window7_224 tnt_s_patch16_224 tnt_b_patch16_224
        twins_pcpvt_small twins_pcpvt_base twins_svt_small twins_svt_base visformer_tiny visformer_small
        deit_small_patch16_224 deit_base_patch16_224 deit_base_patch16_384 cait_xxs24_224 cait_xxs24_384
        cait_xxs36_224 cait_xxs36_384 cait_s24_224 coat_tiny coat_mini coat_lite_tiny coat_lite_mini
        coat_lite_small convit_small convit_base nfnet_f0 efficientnet_b0 efficientnet_b1 efficientnet_b2
    """.split(),
}


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
    add("--baseline", default="deit_small_patch16_224", metavar="MODEL", help="what all others relate to")
    add("--batch-size", nargs="+", default=["32"], metavar="N", help="one or several; auto: what fits")
    add("--max-batch", type=int, help="limit of --batch-size auto; default: 4096 on a GPU")
    add("--img-size", type=int, help="side of the images in pixels; default: each model's own")
    share = "share of the images that leave at the first exit, the rest evenly at the others"
    add("--exit-share", type=float, help=f"{share}; default: 0.78 of two exits, equal shares of more")
    add("--loader", action="store_true", help="time loading instead, with the first model, and both together")
    add("--data-path", metavar="DIR", help="--loader: a folder with images; default: makes 200 JPEGs")
    add("--num_workers", "--workers", type=int, default=min(8, os.cpu_count() or 1), help="loading processes")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--amp", default="none", choices=("none", "bf16", "fp16"), help="autocast")
    streaming.add_compile(parser)
    add("--train", action="store_true", help="time training steps instead of inference")
    add("--threads", type=int, help="of the CPU; default: PyTorch's choice")
    add("--repeats", type=int, default=5, help="timed samples of each model")
    add("--seconds", type=float, default=0.5, help="least length of a sample")
    add("--warmup", type=int, default=3, help="untimed batches")
    add("--seed", type=int, default=0, help="of weights and images")
    for flag, what in (("--csv", "all numbers"), ("--markdown", "the table"), ("--png", "speed over cost")):
        add(flag, type=Path, metavar="FILE", help=f"write {what} here")
    return parser


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[Spec], list[int | str]]:
    """The arguments, the models and the batch sizes.

    Raises:
        ValueError: a model is unknown, or a number is out of range.
        FileNotFoundError: a file's folder does not exist.
    """
    args = make_parser().parse_args(argv)
    for name in ("repeats", "threads", "max_batch", "img_size", "warmup", "seconds", "num_workers"):
        if getattr(args, name) is not None:
            low = 0 if name in ("warmup", "seconds", "num_workers") else 1
            utils.check_range(f"--{name.replace('_', '-')}", getattr(args, name), low)
    if args.exit_share is not None:
        utils.check_range("--exit-share", args.exit_share, 0, 1)
    sizes: list[int | str] = []
    for text in args.batch_size:
        if text != "auto" and not (text.isdecimal() and int(text)):
            raise ValueError(f"--batch-size {text}: take numbers from 1 up, or auto")
        sizes.append(text if text == "auto" else int(text))
    for path in (args.csv, args.markdown, args.png):
        if path and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise FileNotFoundError(f"{path}: name a file in a folder that exists")
    if args.loader and ("auto" in sizes or args.png):
        raise ValueError("--loader takes --batch-size as numbers, and draws no --png")
    default = [args.baseline] if args.loader else LISTS["project"]
    listed = LISTS[args.list] if args.list else [] if args.models else default
    lost = [text for text in listed if not timm.is_model(text.partition(":")[0])]
    if lost:
        log.info("not in this version of timm: %s", ", ".join(lost))
    return args, [Spec.of(text) for text in [*listed, *args.models] if text not in lost], sizes


def draw(rows: list[Row], header: str, path: Path) -> None:
    """Images per second over GFLOPs, one colour per batch size."""
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
    """The header line and a table of the columns that say anything."""
    columns = [name for name in COLUMNS if any(row.get(name) not in (None, "", False) for row in rows)]
    formats = [".1f" if "images" in name or "_m" in name else ".3f" for name in columns]
    cells = [[row.get(name) for name in columns] for row in rows]
    return f"{header}\n\n{tabulate(cells, columns, 'github', formats, missingval='')}\n"


def write_csv(rows: list[Row], path: Path, columns: list[str]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_tables(args: argparse.Namespace, rows: list[Row], table: str, columns: list[str]) -> None:
    """Prints the table, and writes it and all numbers where the command line says."""
    print(table, end="")
    if args.csv:
        utils.write_atomically(args.csv, lambda path: write_csv(rows, path, columns))
    if args.markdown:
        utils.write_atomically(args.markdown, lambda path: path.write_text(table))


def main() -> None:
    utils.start_logging(utils.Context(torch.device("cpu"), 0, 1))
    args, specs, sizes = parse()
    context = utils.start(args.device, args.seed)
    if "auto" in sizes and context.device.type != "cuda" and not args.max_batch:
        raise ValueError(f"--batch-size auto on {context.device.type}: say how far with --max-batch N")
    if args.threads:
        torch.set_num_threads(args.threads)
    precision = Precision.of(context.device, args.amp)
    machine = dict.fromkeys([device_name(context.device), cpu_name()])
    header = (
        f"{', '.join(machine)}, {torch.get_num_threads()} threads,"
        f" PyTorch {torch.__version__}, timm {timm.__version__}, {dtype_name(precision)},"
        f" {f'compiled ({args.compile})' if args.compile else 'eager'}"
    )
    if args.loader:
        log.info(header)
        options = loader_speed.Options(args.num_workers, args.repeats, args.seconds)
        rows = loader_speed.measure(specs[0], args.img_size, args.data_path, sizes, precision, options)
        return write_tables(args, rows, loader_speed.as_markdown(rows, header), loader_speed.COLUMNS)
    given = {name: getattr(args, name) for name in Options._fields if getattr(args, name) is not None}
    bench = Bench(Spec.of(args.baseline), precision, Options(**given))
    header += f", baseline {args.baseline}"
    log.info(header)
    rows: list[Row] = []
    for spec in specs:
        rows += bench.rows(spec, sizes)
        gc.collect()  # a model that failed holds its memory in cycles
        torch.cuda.empty_cache()
    write_tables(args, rows, as_markdown(rows, header), COLUMNS)
    if args.png:
        draw(rows, header, args.png)
    if not any("images_per_second" in row for row in rows):
        raise utils.MainError("no model could be measured; the table says why")


if __name__ == "__main__":
    utils.run_command(main)
