"""Trains and evaluates the models: flags -> data -> model -> loaders -> optimizer -> epochs.

    python main_deit.py --model deit_nano --data-path data/digits --output_dir output/nano
    torchrun --nproc_per_node=4 main_deit.py --model NAME --batch-size 256 --data-path IMAGENET \\
        --output_dir output/NAME

The defaults are DeiT's recipe, with what the model's own recipe changes.
"""

if __name__ == "__main__":  # the imports take seconds
    from checkpointing.interrupt import exit_on_interrupt

    exit_on_interrupt()

import argparse
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import datasets
import utils
from benchmarks.timing import count_gflops, report_speed
from checkpointing.folder import checkpoint_interval, load_newest, locked, set_damaged_aside
from checkpointing.format import WEIGHTS, chosen_weights, load_checkpoint
from checkpointing.optimizer import make_optimizer, refused_options
from checkpointing.run import Run, Settings
from checkpointing.schema import check_arguments, damage_reported
from engine import Objective, Precision, Update, evaluate, train_one_epoch
from inference.pictures import contact_sheet, draw_all, draw_classes, explain
from loading import loaders
from loading.images import Readable
from loading.loaders import AS_BYTES, DeviceLoader, prefetched
from loading.token_labels import PairedTransform, token_targets
from models import Adaptive, flags, recipe_of
from models.exits import DEFAULT_THRESHOLD
from models.weights import (
    create_model,
    inherited_kwargs,
    initialise_from,
    model_from_checkpoint,
    published_name,
)
from utils import NON_NEGATIVE, NON_NEGATIVE_INT, POSITIVE_INT, SHARE, InputError, log

OnOff = argparse.BooleanOptionalAction
AMP = ("auto", "none", "fp16", "bf16")
METRICS = ("top1_f", "top5_f", "top1_c", "top5_c")
EPOCHS, WARMUP = 300, 5  # of DeiT's recipe

# Flags whose values a resumed run does not take from its checkpoint.
OF_ONE_RUN = {"data", "data_path", "use_lmdb", "output_dir", "resume", "eval", "demo", "device"}
OF_ONE_RUN |= {"download", "num_workers", "prefetch_factor", "persistent_workers", "test_speed"}
OF_ONE_RUN |= {"require_cuda", "only_test_speed", "reset_optimizer", "val_labels", "val_synsets"}
# Flags that shape the start of a run: a resumed run has their effect in its weights and generators.
OF_THE_START = ("finetune", "seed")
# Flags of the optimizer's own options, by their names in timm, and its constructor arguments.
OPTIMIZER_FLAGS = {"eps": "opt_eps", "betas": "opt_betas", "momentum": "momentum"}


# Flags


def add_model_flags(group: argparse._ArgumentGroup) -> None:
    flags.add_model_flags(group, training=True)
    add = group.add_argument
    add("--drop-path", type=SHARE, default=0.1, help="stochastic depth rate of the last block")
    add("--finetune", metavar="FILE", help="start from the weights of a timm, DeiT or own checkpoint")


def add_data_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("data", nargs="?", metavar="DIR", help="another way to give --data-path")
    add("--data-path", "--data_url", metavar="DIR", help="folder with train/ and val/")
    datasets.add_data_arguments(group)
    add("--token-label", action="store_true", help="train on token labels, for models that take them")
    add("--token-label-data", metavar="DIR", help="their folder, see scripts/make_token_labels.py")
    add("--download", action="store_true", help="fetch CIFAR if it is not there")
    add("--num_workers", "--workers", type=NON_NEGATIVE_INT, default=10, help="loading processes")
    add("--pin-mem", action=OnOff, default=True, help="page-locked memory for faster transfer to a GPU")
    add("--prefetch-factor", type=POSITIVE_INT, default=2, metavar="N", help="batches each process has ready")
    add("--persistent-workers", action="store_true", help="keep the loading processes between epochs")
    datasets.add_device_normalize(group)
    fast = "decode JPEGs of four or more times the model input's side at a part of their size; other pixels"
    add("--fast-decode", action="store_true", help=fast)
    datasets.add_bad_images(group)
    datasets.add_config_arguments(group)


def add_augmentation_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    whole = "whole images, resized and cropped at the centre; mixing and repeating stay as set"
    add("--no-aug", action="store_true", help=whole)
    add("--scale", type=float, nargs=2, default=(0.08, 1.0), help="area of the random crop")
    add("--ratio", type=float, nargs=2, default=(3 / 4, 4 / 3), help="aspect ratio of the random crop")
    add("--hflip", type=SHARE, default=0.5, help="probability of a horizontal flip")
    add("--vflip", type=SHARE, default=0.0, help="probability of a vertical flip")
    add("--color-jitter", type=NON_NEGATIVE, default=0.4, help="only without --aa")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="auto-augment policy, or none")
    add("--train-interpolation", default="bicubic", choices=("random", *datasets.RESIZE))
    add("--reprob", type=SHARE, default=0.25, help="probability of random erasing")
    add("--remode", default="pixel", choices=("const", "rand", "pixel"))
    add("--recount", type=POSITIVE_INT, default=1, help="erased boxes")
    add("--repeated-aug", action=OnOff, default=True, help="three views of an image per epoch")
    add("--mixup", type=NON_NEGATIVE, default=0.8, help="alpha, 0 for none")
    add("--cutmix", type=NON_NEGATIVE, default=1.0, help="alpha, 0 for none")
    add("--cutmix-minmax", type=float, nargs=2, help="share of the side instead of alpha")
    add("--mixup-prob", type=SHARE, default=1.0)
    add("--mixup-switch-prob", type=SHARE, default=0.5, help="cutmix instead of mixup where both are on")
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"))
    add("--smoothing", type=SHARE, default=0.1, help="label smoothing")


def add_optimisation_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--batch-size", "-b", type=POSITIVE_INT, default=64, help="images per process and batch")
    add("--epochs", type=POSITIVE_INT, default=EPOCHS)
    add("--accumulate", "--grad-accum-steps", type=POSITIVE_INT, default=1, help="batches per update")
    add("--clip-grad", type=NON_NEGATIVE, help="largest gradient norm, 0 for no limit")
    add("--opt", default="adamw", help="any optimizer of timm")
    add(
        "--reset-optimizer",
        action="store_true",
        help="resume without the optimizer's state, as for another --opt",
    )
    add("--opt-eps", type=float, help="epsilon of the optimizer")
    add("--opt-betas", type=float, nargs="+", help="betas of the optimizer")
    add("--momentum", type=NON_NEGATIVE, default=0.9, help="for optimizers that have one")
    add("--weight-decay", type=NON_NEGATIVE, default=0.05)
    add("--lr", type=NON_NEGATIVE, default=5e-4, help="at 512 images per update, see --unscale-lr")
    add("--unscale-lr", action=OnOff, default=False, help="use --lr as it is, whatever the batch")
    steps = "step and multistep: a tenth after each 30 %% of --epochs, multistep three times"
    add("--sched", default="cosine", choices=("cosine", "tanh", "step", "multistep", "poly"), help=steps)
    add("--sched-on-updates", action=OnOff, default=True, help="move the learning rate every update")
    add("--min-lr", type=NON_NEGATIVE, default=1e-5)
    add("--warmup-lr", type=NON_NEGATIVE, default=1e-6)
    warmup = "default: 5, but no more than a tenth of --epochs; a recipe's shrinks with --epochs"
    add("--warmup-epochs", type=NON_NEGATIVE, help=warmup)
    cooldown = "further epochs at --min-lr; a recipe's shrink with --epochs"
    add("--cooldown-epochs", type=NON_NEGATIVE_INT, default=0, help=cooldown)
    add("--model-ema", action=OnOff, default=True, help="keep a moving average of the weights")
    add("--model-ema-decay", type=SHARE, default=0.99996)
    ema = "the average's accuracy decides what is best, and it is what --eval evaluates"
    add("--eval-ema", action=OnOff, default=False, help=ema)
    decides = "accuracy that decides what is best: c first, f last exit"
    add("--eval-metric", default="top1_f", choices=METRICS, help=decides)


def add_run_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output_dir", "--output", metavar="DIR", help="where checkpoints and logs go; default: nowhere")
    newest = "continue a run from its checkpoint; auto: from the newest good one in --output_dir, if any"
    add("--resume", metavar="FILE", help=newest)
    add("--eval", action="store_true", help="evaluate --resume and stop")
    add("--demo", action="store_true", help="draw token depths by class with --finetune and stop")
    add("--test_speed", "--test-speed", action="store_true", help="time the model on random images first")
    add("--only_test_speed", "--only-test-speed", action="store_true", help="do that and stop; needs no data")
    add("--dist-eval", action=OnOff, default=True, help="share the evaluation out over the processes")
    utils.add_device(group)
    add("--amp", nargs="?", const="fp16", default="auto", choices=AMP, help="auto: fp16 on CUDA")
    old = dict(dest="amp", action="store_const", const="fp16", help="the same as --amp fp16")
    add("--apex-amp", "--native-amp", **old)
    utils.add_matmul_precision(group)
    add("--compile", action="store_true", help="compile the model with torch.compile")
    add("--channels-last", action="store_true", help="memory format of images and convolutions")
    add("--seed", type=int, default=0)
    add("--print-freq", type=POSITIVE_INT, default=50, help="batches between log lines")
    add("--save-freq", type=POSITIVE_INT, default=1, help="epochs between checkpoints")
    every = "batches, or minutes with an m, between checkpoints within an epoch"
    add("--checkpoint-every", type=checkpoint_interval, default="10m", metavar="N", help=every)
    keep = "checkpoints to keep, besides model_best.pth"
    add("--keep-last", type=POSITIVE_INT, default=2, metavar="N", help=keep)
    skip = "updates per epoch to leave out, instead of stopping, where loss or gradients are not finite"
    add("--skip-nonfinite", type=NON_NEGATIVE_INT, default=0, metavar="N", help=skip)
    add("--deterministic", action="store_true", help="the same result each time, on the same machine; slower")
    add("--picture-freq", type=NON_NEGATIVE_INT, default=10, help="epochs between pictures, 0 for none")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags, in groups."""
    parser = utils.Parser(description="Trains and evaluates the models.")
    add_model_flags(parser.add_argument_group("model"))
    add_data_flags(parser.add_argument_group("data"))
    add_augmentation_flags(parser.add_argument_group("augmentation"))
    add_optimisation_flags(parser.add_argument_group("optimisation"))
    add_run_flags(parser.add_argument_group("run"))
    return parser


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Read the command line over the checkpoint to resume, if any, over the model's recipe over DeiT's.

    Returns:
        The arguments, and the checkpoint, {} without --resume.
    """
    parser = make_parser()
    defaults = vars(parser.parse_args([]))
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults))))
    given = {name: value for name, value in given.items() if value is not None}
    # The checkpoint, the model that it is of, and the arguments that it was made with
    resume = given.get("resume") or (given.get("finetune") if "demo" in given else None)
    source, checkpoint = open_checkpoint(resume, given.get("output_dir"))
    start = load_checkpoint(given["finetune"]) if given.get("finetune") and not checkpoint else checkpoint
    name = given.get("model") or start.get("model_name")
    if "demo" in given:
        if not source:
            raise InputError("--demo needs the weights to draw with: --finetune FILE")
        name = name or published_name(source)
    # One over the other
    own, recipe = checkpoint.get("args"), recipe_of(name)
    own = own if isinstance(own, dict) else {}
    saved = {key: value for key, value in own.items() if key in defaults.keys() - OF_ONE_RUN}
    check_arguments(parser, saved, source)
    trains = not given.keys() & {"eval", "demo", "only_test_speed"}
    if trains and checkpoint:
        check_resumed(given, saved, checkpoint, source)
    saved, given = without_what_is_replaced(saved, given)
    config = datasets.data_config(recipe, start)
    args = argparse.Namespace(**(defaults | config | recipe | saved | given))
    args.model, args.resume, args.data_path = name, source, args.data_path or args.data
    # What a shorter run has less of
    shares, before = scaled_epochs(recipe, args.epochs), own.get("scaled")
    before = before if isinstance(before, list) else []
    args.scaled = [key for key in shares if key not in given and (saved.get(key) is None or key in before)]
    for key in args.scaled:
        setattr(args, key, shares[key])
    # Which weights decide, or are measured
    if checkpoint and (args.eval or args.demo):
        args.eval_ema = chosen_weights(checkpoint, given.get("eval_ema"), source) == "model_ema"
    elif not args.model_ema and "eval_ema" not in given:
        args.eval_ema = False  # of a recipe
    check_flags(args)
    if trains:
        check_training_flags(args, given)
    return args, checkpoint


def check_resumed(
    given: dict[str, Any], saved: dict[str, Any], checkpoint: dict[str, Any], source: str
) -> None:
    """Check that a run can go on from a checkpoint with the flags that were given.

    Raises:
        InputError: the checkpoint is not of a run, or a flag is for a run that starts.
    """
    if not saved or "optimizer" not in checkpoint:
        what = "no state of a run of this command" if "optimizer" in checkpoint else "weights only"
        raise InputError(f"{source} holds {what}; start from it with --finetune")
    opt = given.get("opt", saved.get("opt"))
    if opt != saved.get("opt") and "reset_optimizer" not in given:
        raise InputError(
            f"--opt {opt}: the run of {source} has {saved.get('opt')}, whose state is of no use to {opt};"
            " --reset-optimizer goes on without it"
        )
    for name in OF_THE_START:
        if name in given and given[name] != saved.get(name, given[name]):
            before = "without" if saved[name] is None else f"with {saved[name]}"
            raise InputError(
                f"--{name} {given[name]}: the run of {source} started {before}; resuming cannot change that"
            )
    wanted = flags.key_values("--model-kwargs", given.get("model_kwargs", []))
    if "init" in wanted and wanted["init"] != checkpoint.get("model_kwargs", {}).get("init"):
        raise InputError(f"--model-kwargs init={wanted['init']}: the weights of {source} are initialised")


def without_what_is_replaced(
    saved: dict[str, Any], given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the saved arguments without those that given ones replace under another name.

    An argument of the model's constructor has two names where there is a flag for it: the flag, and a pair
    KEY=VALUE of --model-kwargs. The given pairs come back with those that are still those of the run.

    Raises:
        InputError: both are given.
    """
    saved, given = saved.copy(), given.copy()
    targets = {flag.words[0]: flag.target for flag in flags.declared_flags()} | {"img_size": "img_size"}
    pairs = flags.key_values("--model-kwargs", given.get("model_kwargs", []))
    for name, target in targets.items():
        if target in pairs and name in given:
            raise InputError(f"--model-kwargs {target}=... and --{name.replace('_', '-')}: give one of them")
        if target in pairs:
            saved.pop(name, None)
    replaced = pairs.keys() | {target for name, target in targets.items() if name in given}
    kept = [pair for pair in saved.pop("model_kwargs", None) or [] if pair.partition("=")[0] not in replaced]
    if kept:
        given["model_kwargs"] = [*kept, *given.get("model_kwargs", [])]
    if given.get("opt", saved.get("opt")) != saved.get("opt"):
        saved = {name: value for name, value in saved.items() if name not in OPTIMIZER_FLAGS.values()}
    return saved, given


def scaled_epochs(recipe: dict[str, Any], epochs: int) -> dict[str, Any]:
    """Return the epochs of warm-up and cooldown that a run has where no flag says how many.

    A recipe's are in proportion where a run has fewer epochs than the recipe.
    """
    warmup, cooldown = recipe.get("warmup_epochs"), recipe.get("cooldown_epochs", 0)
    share = min(1, epochs / recipe.get("epochs", EPOCHS))
    return dict(
        warmup_epochs=min(WARMUP, epochs / 10) if warmup is None else warmup * share,
        cooldown_epochs=round(cooldown * share),
    )


def log_scaled(args: argparse.Namespace) -> None:
    """Log which epochs of warm-up and cooldown a short run has less of."""
    full = {"warmup_epochs": WARMUP, "cooldown_epochs": 0} | recipe_of(args.model)
    less = [name for name in args.scaled if getattr(args, name) != full[name]]
    texts = [f"--{name.replace('_', '-')} {full[name]} to {getattr(args, name):g}" for name in less]
    if less:
        log.info("scaled to %d epochs: %s", args.epochs, ", ".join(texts))


def open_checkpoint(resume: str | None, output_dir: str | None) -> tuple[str | None, dict[str, Any]]:
    """Return the file that --resume names and its content; None and {} where there is none."""
    if resume != "auto":
        return resume, load_checkpoint(resume) if resume else {}
    if not output_dir:
        raise InputError("--resume auto looks into --output_dir: give one")
    path, checkpoint = load_newest(Path(output_dir))
    return path and str(path), checkpoint


def check_flags(args: argparse.Namespace) -> None:
    """Check that the flags go together.

    Raises:
        InputError: they do not.
    """
    if not args.data_path and not args.only_test_speed:
        raise InputError("no data: give the folder that holds train/ and val/ with --data-path DIR")
    if args.eval and not args.resume:
        raise InputError("--eval needs the checkpoint to evaluate: --resume FILE")


def check_training_flags(args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Check that the flags of training go together, and that each has an effect.

    Args:
        args: all of them.
        given: those of the command line.

    Raises:
        InputError: they do not.
    """
    mixes = mixing_options(args)
    if mixes and args.batch_size % 2:
        raise InputError(
            f"--batch-size {args.batch_size} is odd and mixup pairs images:"
            " take an even one, or --mixup 0 --cutmix 0"
        )
    if args.token_label and not args.token_label_data:
        raise InputError("--token-label needs the folder of the labels: --token-label-data DIR")
    if args.token_label and (args.data_set != "IMNET" or args.use_lmdb or args.no_aug or mixes):
        raise InputError(
            "--token-label goes with --data-set IMNET, --mixup 0 and --cutmix 0, without --no-aug, --use-lmdb"
        )
    if given.get("eval_ema") and not args.model_ema:
        raise InputError("--eval-ema needs the average: --model-ema")
    if "min_lr" in given and args.sched in ("step", "multistep"):
        raise InputError(f"--min-lr: --sched {args.sched} has no lowest rate")
    pairs = flags.key_values("--model-kwargs", given.get("model_kwargs", []))
    for name, way in (("drop_path_rate", "give it as --drop-path"), ("num_classes", "the data tell it")):
        if name in pairs:
            raise InputError(f"--model-kwargs {name}={pairs[name]}: {way}")
    for option in refused_options(args.opt):
        if (flag := OPTIMIZER_FLAGS[option]) in given:
            raise InputError(f"--{flag.replace('_', '-')}: --opt {args.opt} has no {option}")
    make_optimizer([{"params": [nn.Parameter(torch.zeros(2, 2))]}], **optimizer_options(args, 512))


# From flags to the options of what is built


def model_kwargs(args: argparse.Namespace, num_classes: int | None) -> dict[str, Any]:
    """Return constructor arguments of the model; shares of the run become epochs."""
    kwargs = flags.constructor_kwargs(vars(args), args.epochs) | {"drop_path_rate": args.drop_path}
    return kwargs if num_classes is None else kwargs | {"num_classes": num_classes}


def augmentation_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return arguments of timm.data.create_transform."""
    options = dict(
        scale=tuple(args.scale),
        ratio=tuple(args.ratio),
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        auto_augment=None if args.aa == "none" else args.aa,
        interpolation=args.train_interpolation,
        re_prob=0.0 if args.no_aug else args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
    )
    return options | ({"no_aug": True} if args.no_aug else {}) | (AS_BYTES if args.device_normalize else {})


def mixing_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return arguments of timm.data.Mixup, none where neither mixup nor cutmix is on."""
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax):
        return {}
    return dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
    )


def loading_options(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return arguments that both loaders take."""
    options = dict(num_workers=args.num_workers, pin_memory=args.pin_mem and device.type == "cuda")
    if args.num_workers:
        options |= dict(prefetch_factor=args.prefetch_factor, persistent_workers=args.persistent_workers)
    return options


def optimizer_options(args: argparse.Namespace, global_batch_size: int) -> dict[str, Any]:
    """Return arguments of make_optimizer."""
    optional = {"eps": args.opt_eps, "betas": args.opt_betas}
    return dict(
        opt=args.opt,
        lr=args.lr if args.unscale_lr else args.lr * global_batch_size * args.accumulate / 512,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
        **{name: value for name, value in optional.items() if value is not None},
    )


def schedule_options(args: argparse.Namespace, batches: int) -> dict[str, Any]:
    """Return arguments of create_scheduler_v2 for so many batches per epoch."""
    return dict(
        sched=args.sched,
        num_epochs=args.epochs,
        min_lr=args.min_lr,
        warmup_lr=args.warmup_lr,
        warmup_epochs=args.warmup_epochs,
        decay_epochs=0.3 * args.epochs,
        decay_milestones=[share * args.epochs for share in (0.3, 0.6, 0.9)],
        step_on_epochs=not args.sched_on_updates,
        updates_per_epoch=math.ceil(batches / args.accumulate),
    )


def bad_options(args: argparse.Namespace, folder: Path | None) -> tuple[int, Path | None]:
    """Return how many images may be unreadable, and the file that lists them."""
    return args.max_bad_images, folder and folder / "bad_images.txt"


def order_options(args: argparse.Namespace, context: utils.Context) -> dict[str, Any]:
    """Return arguments of train_loader that say which process sees which images."""
    repeats = 3 if args.repeated_aug else 1
    return dict(repeats=repeats, seed=args.seed, rank=context.rank, world_size=context.world_size)


def device_options(args: argparse.Namespace, device: torch.device, config: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of DeviceLoader, the device alone where images are normalised as they are loaded."""
    if not args.device_normalize:
        return dict(device=device)
    erasing = {key: augmentation_options(args)[key] for key in ("re_prob", "re_mode", "re_count")}
    return dict(device=device, config=config, **erasing)


def run_settings(
    args: argparse.Namespace, folder: Path | None, num_exits: int, model: tuple[str, dict, list[str], dict]
) -> Settings:
    """Return where a run writes, how often, and what is the same in all its checkpoints.

    Args:
        args: the command line.
        folder: where it writes.
        num_exits: of the model.
        model: its name, constructor arguments, classes and data config.
    """
    averaged = args.eval_ema and args.model_ema
    constant = dict(zip(("model_name", "model_kwargs", "class_names", "data_config"), model, strict=True))
    constant |= {"best_weights": "model_ema" if averaged else "model", "args": vars(args)}
    return Settings(
        folder=folder,
        epochs=args.epochs + args.cooldown_epochs,
        checkpoint_every=args.checkpoint_every,
        save_freq=args.save_freq,
        keep_last=args.keep_last,
        print_freq=args.print_freq,
        best_by=score_name(args.eval_metric, averaged, num_exits),
        constant=constant,
    )


# Steps of a run


def be_deterministic() -> None:
    """Make all results repeatable on the same machine; an operation that cannot be raises an error."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and nothing here reads such memory
    torch.backends.cudnn.benchmark = False


@contextmanager
def output_folder(
    folder: Path | None, resume: str | None, context: utils.Context, trains: bool, earlier: MemoryHandler
) -> Iterator[None]:
    """Log to a folder, `earlier` lines first, while the body runs; for training, keep it for this run.

    Raises:
        InputError: another run has it, or it is not the same folder for all processes.
    """
    with ExitStack() as stack:
        if folder and trains:
            utils.by_main(context, lambda: stack.enter_context(locked(folder)))
        elif folder:
            utils.by_main(context, lambda: folder.mkdir(parents=True, exist_ok=True))
        utils.start_logging(context, folder / "train.log" if folder else None)
        for record in earlier.buffer if folder and context.is_main else ():
            log.handlers[-1].handle(record)
        if folder and trains:
            if len(set(utils.gather(resume))) > 1:
                raise InputError(
                    f"--output_dir {folder} is not the same folder for all processes: give a shared one"
                )
            if resume and Path(resume).parent == folder:
                utils.by_main(context, lambda: set_damaged_aside(folder, Path(resume)))
        yield


def build_model(
    checkpoint: dict[str, Any],
    source: str | None,
    name: str | None,
    kwargs: dict[str, Any],
    use_ema: bool | None = None,
) -> tuple[Adaptive, str, dict[str, Any]]:
    """Build a model with the weights of a checkpoint to resume, or with those to start from, or new ones.

    Args:
        checkpoint: to resume, or {}.
        source: of its weights: the checkpoint's file, or that of --finetune, or None.
        name: of the model; not needed where the checkpoint tells it.
        kwargs: constructor arguments from the command line.
        use_ema: see `checkpointing.format.chosen_weights`.

    Returns:
        The model, its name and its constructor arguments.
    """
    if not source:
        return create_model(name, kwargs), name, kwargs
    start = checkpoint or load_checkpoint(source)
    key = chosen_weights(start, use_ema, source)
    if checkpoint:
        model, name, kwargs = model_from_checkpoint(checkpoint, source, name, kwargs, key == "model_ema")
    else:
        kwargs = inherited_kwargs(name, start, source) | kwargs
        model = create_model(name, kwargs)
        initialise_from(model, start[key], source)
    log.info("%s (%s) of %s", WEIGHTS[key], key, source)
    return model, name, kwargs


def augmented(
    trainset: Dataset, img_size: int, config: dict[str, Any], augmentation: dict[str, Any], labels: str | None
) -> Dataset:
    """Return the training set with its transform, and with the token labels of a folder, if one is given."""
    if labels:
        transform = PairedTransform(img_size, config, **augmentation)
        return datasets.TokenLabelled(trainset, labels, transform)
    trainset.transform = datasets.train_transform(img_size, config, **augmentation)
    return trainset


def score_name(metric: str, averaged: bool, num_exits: int) -> str:
    """Return which measure of an evaluation a value of --eval-metric means."""
    exit_ = 0 if metric.endswith("_c") else num_exits - 1
    return f"{'ema' if averaged else 'test'}_exit{exit_}_acc{metric[3]}"


def make_objective(
    model: Adaptive, batch_size: int, smoothing: float, mixing: dict[str, Any], token_labels: bool
) -> Objective:
    """Return the loss of one exit's logits, and what makes its targets soft, if anything does."""
    if token_labels:
        if not model.token_labels:
            raise InputError(f"--token-label: {type(model).__name__} has no loss for them")
        grid = model.img_size // model.patch_size

        def targets(images: Tensor, label: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
            return images, token_targets(label, box, model.num_classes, grid, smoothing)

        return Objective(SoftTargetCrossEntropy(), targets)
    if mixing:
        if batch_size % 2:
            raise InputError("mixup pairs images and there is only one per process: --mixup 0 --cutmix 0")
        mixup = Mixup(**mixing, label_smoothing=smoothing, num_classes=model.num_classes)
        return Objective(SoftTargetCrossEntropy(), mixup)
    return Objective(LabelSmoothingCrossEntropy(smoothing) if smoothing > 0 else nn.CrossEntropyLoss())


def in_parallel(model: Adaptive, context: utils.Context, compiled: bool) -> nn.Module:
    """Compile a model where asked to, and wrap it where there is a process group, also one of one."""
    if compiled:
        # Whole numbers that a schedule moves become symbols instead of new compilations.
        torch._dynamo.config.allow_unspec_int_on_nn_module = True
        model.compile()
    if not dist.is_initialized():
        return model
    ids = [context.device.index] if context.device.type == "cuda" else None
    newer = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    return DistributedDataParallel(
        model,
        device_ids=ids,
        find_unused_parameters=model.varying_graph,
        gradient_as_bucket_view=True,  # no copy of the gradients
        **{"forward_sync_buffers" if newer else "broadcast_buffers": False},
    )


def draw_demo(model: Adaptive, loader: DataLoader, config: dict[str, Any], folder: Path | None) -> None:
    """Draw token depths by class, of the images of a loader."""
    thresholds = [DEFAULT_THRESHOLD] * (model.num_exits - 1)
    classes = loader.dataset.dataset.classes
    draw_classes(model, loader, config, thresholds, folder or Path("token_act_visualization"), classes)


def log_measures(model: Adaptive, loader: DataLoader, precision: Precision, key: str, source: str) -> None:
    """Evaluate weights, which lie in a file under `key`, and log what is measured, a line each."""
    log.info("evaluating the %s (%s) of %s", WEIGHTS[key], key, source)
    prefix = "ema_" if key == "model_ema" else "test_"
    for name, value in evaluate(model, loader, precision, prefix).items():
        log.info("%s %.3f", name, value)


class Data(NamedTuple):
    """What a run trains and is evaluated on.

    Attributes:
        train: loader of augmented batches.
        readable: what it loads; its `bad` knows the images that cannot be read.
        val: loader of the evaluation images, in order.
        config: how an image becomes model input.
        classes: their names.
    """

    train: DataLoader | DeviceLoader
    readable: Readable
    val: DataLoader
    config: dict[str, Any]
    classes: list[str]


def train_epochs(
    run: Run,
    wrapped: nn.Module,
    data: Data,
    objective: Objective,
    precision: Precision,
    picture_freq: int,
) -> None:
    """Train, evaluate and save for all epochs that are left.

    Args:
        run: with the model and its optimizer.
        wrapped: the run's model, wrapped where there is a process group.
        data: what to train and evaluate on.
        objective: what is minimised.
        precision: device and autocast type.
        picture_freq: epochs between TensorBoard pictures, 0 for none.
    """
    name, model, update = run.settings.constant["model_name"], run.model, run.update
    counts = run.parameters, len(data.readable), len(data.val.dataset.dataset)
    log.info("%s: %d parameters, %d training and %d validation images", name, *counts)
    if run.context.is_main and (gflops := count_gflops(model, name)):
        log.info("GFLOPs per exit: %s", ", ".join(f"{cost:.3f}" for cost in gflops))
    if run.epoch >= run.epochs:
        log.info("nothing is left to train: %d epochs are done, of %d", run.epoch, run.epochs)
    with run.started():
        while run.epoch < run.epochs:
            epoch = run.epoch
            # Training
            data.train.sampler.set_epoch(epoch, run.progress.step * data.train.batch_size)
            losses = train_one_epoch(wrapped, data.train, objective, update, epoch, precision, run)
            losses |= {name: getattr(model, name) for name in model.knobs}
            data.readable.bad.report(precision.device)
            # Evaluation; every process has its own running statistics, and their average is evaluated.
            if dist.is_initialized():
                for part in update.with_average(model):
                    distribute_bn(part, run.context.world_size, reduce=True)
            measures = evaluate(model, data.val, precision)
            if update.ema is not None:
                measures |= evaluate(update.ema.module, data.val, precision, "ema_")
            # Logs and checkpoints
            entry = {f"train_{name}": value for name, value in losses.items()} | measures
            run.end_epoch(entry, measures[run.settings.best_by])
            exits = enumerate(model.stage_names)
            accuracy = [f"{stage} {measures[f'test_exit{k}_acc1']:.2f}" for k, stage in exits]
            log.info("epoch %d: top-1 %s; best %.2f", epoch, ", ".join(accuracy), run.best)
            if run.log.board and picture_freq and epoch % picture_freq == 0:
                run.log.board.add_image("regions", picture_of(model, data), epoch)


def picture_of(model: Adaptive, data: Data) -> torch.Tensor:
    """Return a contact sheet [3,H,W] of what the model looks at in the first evaluation images."""
    thresholds = [DEFAULT_THRESHOLD] * (model.num_exits - 1)
    indices = data.val.dataset.bad.read()[:8].tolist()
    sheet = explain(model, data.val.dataset.dataset, indices, data.config, thresholds)
    return contact_sheet(draw_all(sheet, model.stage_names, data.classes))


def validation_set(
    source: datasets.DataSource, model: Adaptive, config: dict[str, Any], classes: list[str] | None
) -> Dataset:
    """Open the validation images of a model's classes."""
    transform = datasets.eval_transform(model.img_size, config)
    valset = datasets.build_dataset(source, "val", transform, classes)
    datasets.check_classes(valset, model.num_classes)
    return valset


def training_loader(
    readable: Readable,
    batch_size: int,
    order: dict[str, Any],
    loading: dict[str, Any],
    device: dict[str, Any],
) -> DataLoader | DeviceLoader:
    """Load training images, shuffled; `device` is what `device_options` returns."""
    loader = loaders.train_loader(readable, batch_size, **order, **loading)
    return DeviceLoader(loader, **device) if "config" in device else prefetched(loader, **device)


def make_update(
    model: Adaptive,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    schedule: dict[str, Any],
    scaler: torch.amp.GradScaler,
    ema_decay: float | None,
    rules: tuple[int, float | None, int],
) -> Update:
    """Make an optimizer over a model that is on its device, with its companions.

    Args:
        model: not wrapped.
        make: makes the optimizer.
        schedule: arguments of create_scheduler_v2.
        scaler: of gradients.
        ema_decay: of the moving average; None for none.
        rules: batches per update, largest gradient norm, and updates that may be left out, see `Update`.
    """
    optimizer = make(model)
    scheduler, _ = create_scheduler_v2(optimizer, **schedule)
    ema = None if ema_decay is None else ModelEmaV3(model, decay=ema_decay)
    return Update(optimizer, scheduler, scaler, ema, *rules)


def main() -> None:
    args, checkpoint = parse()
    if args.deterministic:
        be_deterministic()
    context = utils.start(args.device, args.seed, args.require_cuda)
    torch.set_float32_matmul_precision(args.matmul_precision)
    precision = Precision.of(context.device, args.amp, args.channels_last)
    folder = Path(args.output_dir) if args.output_dir else None
    trains = not (args.eval or args.demo or args.only_test_speed)
    # Training images, of the checkpoint's classes if there is one; nothing is written if they are not there.
    source = datasets.DataSource.of(args, args.data_path)
    source = source._replace(download=args.download and context.is_local_main)
    trainset, classes = None, checkpoint.get("class_names")
    utils.start_logging(context)
    log.addHandler(earlier := MemoryHandler(1000, flushLevel=100, flushOnClose=False))
    utils.log_device(context, args.device)
    if trains:
        with utils.main_first(context):
            trainset = datasets.build_dataset(source, "train", classes=classes)
        classes = trainset.classes
    with output_folder(folder, args.resume, context, trains, earlier):
        # Model
        kwargs = model_kwargs(args, len(classes) if trains and not checkpoint else None)
        use_ema = args.eval_ema if args.eval or args.demo else False if checkpoint else None
        start = args.resume or args.finetune
        model, name, kwargs = build_model(checkpoint, start, args.model, kwargs, use_ema)
        if trains:
            datasets.check_classes(trainset, model.num_classes)
        if (args.test_speed or args.only_test_speed) and context.is_main:
            report_speed(model, name, precision, args.batch_size, folder)
        if args.only_test_speed:
            return
        model.to(context.device, memory_format=precision.memory_format)
        # Evaluation
        config = {key: getattr(args, key) for key in datasets.DATA_CONFIG}
        images_are = "images: %d pixels, %s", model.img_size, datasets.describe_config(config)
        loading, limits = loading_options(args, context.device), bad_options(args, folder)
        shared = (context.rank, context.world_size) if args.dist_eval and not args.demo else (0, 1)
        valset = validation_set(source, model, config, classes)
        shard = loaders.Shard(valset, *shared, *limits)
        val_loader = loaders.EvalLoader(shard, int(1.5 * args.batch_size), **loading)
        val_loader = prefetched(val_loader, context.device)
        if args.demo:
            return draw_demo(model, val_loader, config, folder) if context.is_main else None
        if args.eval:
            log.info(*images_are)
            return log_measures(model, val_loader, precision, "model_ema" if use_ema else "model", start)
        # Training data
        trainset.side = 2 * model.img_size if args.fast_decode else 0
        augmentation, labels = augmentation_options(args), args.token_label_data if args.token_label else None
        readable = Readable(augmented(trainset, model.img_size, config, augmentation, labels), *limits)
        order = order_options(args, context)
        on_device = device_options(args, context.device, config)
        train_loader = training_loader(readable, args.batch_size, order, loading, on_device)
        data = Data(train_loader, readable, val_loader, config, list(classes))
        # Optimizer; wrapping gives all processes the weights that the moving average starts from.
        wrapped, images = in_parallel(model, context, args.compile), train_loader.batch_size
        objective = make_objective(model, images, args.smoothing, mixing_options(args), bool(labels))
        make = partial(make_optimizer, **optimizer_options(args, images * context.world_size))
        schedule, decay = schedule_options(args, len(train_loader)), args.model_ema_decay
        rules = args.accumulate, args.clip_grad, args.skip_nonfinite
        update = make_update(
            model, make, schedule, precision.scaler(), decay if args.model_ema else None, rules
        )
        # Epochs
        log.info(*images_are)
        log_scaled(args)
        settings = run_settings(args, folder, model.num_exits, (name, kwargs, data.classes, config))
        run = Run(settings, context, model, update, images * context.world_size, len(train_loader))
        if checkpoint:
            with damage_reported(args.resume):
                run.restore(checkpoint, args.resume, None if args.reset_optimizer else make)
        train_epochs(run, wrapped, data, objective, precision, args.picture_freq)


if __name__ == "__main__":
    utils.run_command(main)
