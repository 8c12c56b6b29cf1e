"""Trains and evaluates the models: arguments -> data -> model -> optimizer -> epochs.

    python main_deit.py --model lf_deit_nano --data-path data/digits --output_dir output/nano
    torchrun --nproc_per_node=4 main_deit.py --model lf_deit_small --batch-size 256 --data-path IMAGENET \
        --location-stage-size 7 --dist-eval --output_dir output/lf_7x7

The defaults are DeiT's recipe, with what the model's own recipe changes.
"""

import argparse
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import datasets
import utils
from benchmarks.timing import report_speed
from checkpointing import folder as checkpoints
from checkpointing.format import load_checkpoint
from checkpointing.run import Run
from checkpointing.schema import check_arguments, damage_told
from engine import Precision, Update, evaluate, train_one_epoch
from inference.pictures import contact_sheet, draw_all, draw_classes, explain
from loading import loaders
from loading.images import Readable
from loading.loaders import AS_BYTES, DeviceLoader
from loading.token_labels import PairedTransform, token_targets
from models import Adaptive, flags, recipe_of
from models.weights import (
    create_model,
    initialise_from,
    model_from_checkpoint,
    published_kwargs,
    published_name,
)
from utils import log

OnOff = argparse.BooleanOptionalAction

# What a resumed run does not take over from its checkpoint.
OF_ONE_RUN = (
    "data",
    "data_path",
    "use_lmdb",
    "output_dir",
    "resume",
    "eval",
    "demo",
    "device",
    "finetune",
    "download",
    "num_workers",
    "prefetch_factor",
    "persistent_workers",
    "test_speed",
    "only_test_speed",
)

SHARES = ("drop_path", "hflip", "vflip", "reprob", "mixup_prob", "mixup_switch_prob", "smoothing")

SHARES += ("select_from", "coarse_only", "crop_pct", "model_ema_decay")

FROM_0 = ("mixup", "cutmix", "lr", "min_lr", "warmup_lr", "weight_decay", "warmup_epochs", "momentum")

FROM_0 += ("cooldown_epochs", "color_jitter", "picture_freq", "skip_nonfinite", "max_bad_images", "clip_grad")

FROM_1 = ("batch_size", "epochs", "accumulate", "print_freq", "save_freq", "keep_last", "recount")

FROM_1 += ("prefetch_factor",)

AMP = ("auto", "none", "fp16", "bf16")

RESIZE = ("bilinear", "bicubic", "lanczos", "nearest")

METRICS = ("top1_f", "top5_f", "top1_c", "top5_c")


def make_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(description="Trains and evaluates the models.")
    group = parser.add_argument_group("model")
    flags.add_model_flags(group, training=True)
    add = group.add_argument
    add("--drop-path", type=float, default=0.1, help="stochastic depth rate of the last block")
    add("--finetune", metavar="FILE", help="start from the weights of a timm, DeiT or own checkpoint")

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("data", nargs="?", metavar="DIR", help="another way to give --data-path")
    add("--data-path", "--data_url", metavar="DIR", help="folder with train/ and val/")
    datasets.add_data_arguments(group)
    add("--token-label", action="store_true", help="train on token labels, for models that take them")
    add("--token-label-data", metavar="DIR", help="their folder, see scripts/make_token_labels.py")
    add("--download", action="store_true", help="fetch CIFAR if it is not there")
    add("--num_workers", "--workers", type=int, default=10, help="loading processes")
    add("--pin-mem", action=OnOff, default=True, help="page-locked memory for faster transfer to a GPU")
    add("--prefetch-factor", type=int, default=2, metavar="N", help="batches each process has ready")
    add("--persistent-workers", action="store_true", help="keep the loading processes between epochs")
    datasets.add_device_normalize(group)
    add(
        "--fast-decode",
        action="store_true",
        help="decode training JPEGs of four or more times the model input's side at a part of their size;"
        " slightly other pixels",
    )
    datasets.add_bad_images(group)
    add("--crop-pct", type=float, help="share of the evaluation images that the crop keeps; default: 0.875")
    add("--interpolation", choices=RESIZE, help="of the evaluation images; default: bicubic")
    add("--mean", type=float, nargs=3, help="of the channels; default: ImageNet's")
    add("--std", type=float, nargs=3, help="of the channels; default: ImageNet's")

    add = parser.add_argument_group("augmentation").add_argument
    add(
        "--no-aug",
        action="store_true",
        help="whole images, resized and cropped at the centre; mixing and repeating stay as set",
    )
    add("--scale", type=float, nargs=2, default=(0.08, 1.0), help="area of the random crop")
    add("--ratio", type=float, nargs=2, default=(3 / 4, 4 / 3), help="aspect ratio of the random crop")
    add("--hflip", type=float, default=0.5, help="probability of a horizontal flip")
    add("--vflip", type=float, default=0.0, help="probability of a vertical flip")
    add("--color-jitter", type=float, default=0.4, help="only without --aa")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="auto-augment policy, or none")
    add("--train-interpolation", default="bicubic", choices=("random", *RESIZE))
    add("--reprob", type=float, default=0.25, help="probability of random erasing")
    add("--remode", default="pixel", choices=("const", "rand", "pixel"))
    add("--recount", type=int, default=1, help="erased boxes")
    add("--repeated-aug", action=OnOff, default=True, help="three views of an image per epoch")
    add("--mixup", type=float, default=0.8, help="alpha, 0 for none")
    add("--cutmix", type=float, default=1.0, help="alpha, 0 for none")
    add("--cutmix-minmax", type=float, nargs=2, help="share of the side instead of alpha")
    add("--mixup-prob", type=float, default=1.0)
    add("--mixup-switch-prob", type=float, default=0.5, help="cutmix instead of mixup where both are on")
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"))
    add("--smoothing", type=float, default=0.1, help="label smoothing")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", "-b", type=int, default=64, help="images per process and batch")
    add("--epochs", type=int, default=300)
    add("--accumulate", "--grad-accum-steps", type=int, default=1, help="batches per update")
    add("--clip-grad", type=float, help="largest gradient norm")
    add("--opt", default="adamw", help="any optimizer of timm")
    add("--opt-eps", type=float, help="epsilon of the optimizer")
    add("--opt-betas", type=float, nargs=2, help="betas of the optimizer")
    add("--momentum", type=float, default=0.9, help="for optimizers that have one")
    add("--weight-decay", type=float, default=0.05)
    add("--lr", type=float, default=5e-4, help="at 512 images per update, see --unscale-lr")
    add("--unscale-lr", action=OnOff, default=False, help="use --lr as it is, whatever the batch")
    add("--sched", default="cosine", choices=("cosine", "tanh", "step", "multistep", "poly"))
    add("--sched-on-updates", action=OnOff, default=True, help="move the learning rate every update")
    add("--min-lr", type=float, default=1e-5)
    add("--warmup-lr", type=float, default=1e-6)
    add("--warmup-epochs", type=float, help="default: 5, but no more than a tenth of --epochs")
    add("--cooldown-epochs", type=int, default=0, help="further epochs at --min-lr")
    add("--model-ema", action=OnOff, default=True, help="keep a moving average of the weights")
    add("--model-ema-decay", type=float, default=0.99996)
    add(
        "--eval-ema",
        action=OnOff,
        default=False,
        help="the average's accuracy decides on the best checkpoint",
    )
    add(
        "--eval-metric", default="top1_f", choices=METRICS, help="accuracy that decides: c first, f last exit"
    )

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", "--output", metavar="DIR", help="where checkpoints and logs go; default: nowhere")
    add(
        "--resume",
        metavar="FILE",
        help="continue a run from its checkpoint; auto: from the newest good one in --output_dir, if any",
    )
    add("--eval", action="store_true", help="evaluate --resume and stop")
    add("--demo", action="store_true", help="A-ViT: draw token depths by class with --finetune and stop")
    add("--test_speed", "--test-speed", action="store_true", help="time the model on random images first")
    add("--only_test_speed", "--only-test-speed", action="store_true", help="do that and stop; needs no data")
    add("--dist-eval", action=OnOff, default=True, help="share the evaluation out over the processes")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--amp", nargs="?", const="fp16", default="auto", choices=AMP, help="auto: fp16 on CUDA")
    add(
        "--apex-amp",
        "--native-amp",
        dest="amp",
        action="store_const",
        const="fp16",
        help="the same as --amp fp16",
    )
    add("--compile", action="store_true", help="compile the model with torch.compile")
    add("--channels-last", action="store_true", help="memory format of images and convolutions")
    add("--seed", type=int, default=0)
    add("--print-freq", type=int, default=50, help="batches between log lines")
    add("--save-freq", type=int, default=1, help="epochs between checkpoints")
    add(
        "--checkpoint-every",
        type=checkpoints.interval,
        default="10m",
        metavar="N",
        help="batches, or minutes with an m, between checkpoints within an epoch",
    )
    add("--keep-last", type=int, default=2, metavar="N", help="checkpoints to keep, besides model_best.pth")
    add(
        "--skip-nonfinite",
        type=int,
        default=0,
        metavar="N",
        help="updates per epoch to leave out, instead of stopping, where loss or gradients are not finite",
    )
    add("--deterministic", action="store_true", help="the same result each time, on the same machine; slower")
    add("--picture-freq", type=int, default=10, help="epochs between TensorBoard pictures, 0 for none")
    return parser


def mixes(args: argparse.Namespace) -> bool:
    """Whether mixup or cutmix is on."""
    return bool(args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax)


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict]:
    """Command line over the checkpoint to resume, if any, over the model's recipe over DeiT's.

    Returns:
        The arguments and the checkpoint, {} without --resume.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    source = args.resume or (args.finetune if args.demo else None)
    if source == "auto":
        if not args.output_dir:
            raise ValueError("--resume auto looks into --output_dir: give one")
        source, checkpoint = checkpoints.find_newest(Path(args.output_dir))
    else:
        checkpoint = load_checkpoint(source) if source else {}
    name = args.model or checkpoint.get("model_name", "")
    if args.demo:
        if not source:
            raise ValueError("--demo needs the weights to draw with: --finetune FILE")
        name = name or published_name(source)
    recipe = recipe_of(name or "")
    saved = checkpoint.get("args") if isinstance(checkpoint.get("args"), dict) else {}
    saved = {key: value for key, value in saved.items() if key in vars(args) and key not in OF_ONE_RUN}
    check_arguments(parser, saved, str(source))
    parser.set_defaults(**(datasets.data_config(recipe, checkpoint) | recipe | saved))
    args = parser.parse_args(argv)
    if args.resume:
        args.resume = source and str(source)
    if args.demo:
        args.model, args.resume = name, source
    if args.warmup_epochs is None:
        args.warmup_epochs = min(5, args.epochs / 10)
    for names, *bounds in ((FROM_0, 0), (FROM_1, 1), (SHARES, 0, 1)):
        for name in names:
            if getattr(args, name) is not None:
                utils.check_range(f"--{name.replace('_', '-')}", getattr(args, name), *bounds)
    if mixes(args) and args.batch_size % 2 and not (args.only_test_speed or args.demo):
        raise ValueError(
            f"--batch-size {args.batch_size} is odd and mixup pairs images:"
            " take an even one, or --mixup 0 --cutmix 0"
        )
    args.data_path = args.data_path or args.data
    if not args.data_path and not args.only_test_speed:
        raise ValueError("no data: give the folder that holds train/ and val/ with --data-path DIR")
    if args.token_label and not args.token_label_data:
        raise ValueError("--token-label needs the folder of the labels: --token-label-data DIR")
    if args.token_label and (args.data_set != "IMNET" or args.use_lmdb or args.no_aug or mixes(args)):
        raise ValueError(
            "--token-label goes with --data-set IMNET, --mixup 0 and --cutmix 0, without --no-aug, --use-lmdb"
        )
    if args.eval and not args.resume:
        raise ValueError("--eval needs the checkpoint to evaluate: --resume FILE")
    return args, checkpoint


def model_kwargs(args: argparse.Namespace, num_classes: int | None) -> dict:
    """Constructor arguments; shares of the run become epochs."""
    kwargs = flags.constructor_kwargs(vars(args), args.epochs) | {"drop_path_rate": args.drop_path}
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    return kwargs


def augmentation(args: argparse.Namespace) -> dict:
    """Arguments of timm.data.create_transform."""
    return dict(
        scale=tuple(args.scale),
        ratio=tuple(args.ratio),
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        auto_augment=None if args.aa == "none" else args.aa,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
    )


def make_criterion(args: argparse.Namespace, model: Adaptive) -> tuple[nn.Module, Callable | None]:
    """Loss on one exit's logits, and what makes its targets soft, if anything does."""
    num_classes = model.num_classes
    if args.token_label:
        if not model.token_labels:
            raise ValueError(f"--token-label: {args.model} has no loss for them")
        grid = model.img_size // model.patch_size

        def targets(
            images: torch.Tensor, label: torch.Tensor, box: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return images, token_targets(label, box, num_classes, grid, args.smoothing)

        return SoftTargetCrossEntropy(), targets
    if mixes(args):
        mixup = Mixup(
            args.mixup,
            args.cutmix,
            args.cutmix_minmax,
            args.mixup_prob,
            args.mixup_switch_prob,
            args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )
        return SoftTargetCrossEntropy(), mixup
    return (LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing > 0 else nn.CrossEntropyLoss()), None


def make_update(args: argparse.Namespace, model: nn.Module, images: int, batches: int, scaler) -> Update:
    """Optimizer, schedule and moving average over a model that is on its device.

    Args:
        args: the command line.
        model: not wrapped.
        images: per batch, over all processes.
        batches: per epoch.
        scaler: gradient scaler.
    """
    options = {"eps": args.opt_eps, "betas": args.opt_betas}
    optimizer = create_optimizer_v2(
        model,
        args.opt,
        lr=args.lr if args.unscale_lr else args.lr * images * args.accumulate / 512,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
        **{name: value for name, value in options.items() if value is not None},
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        args.sched,
        num_epochs=args.epochs,
        min_lr=args.min_lr,
        warmup_lr=args.warmup_lr,
        warmup_epochs=args.warmup_epochs,
        step_on_epochs=not args.sched_on_updates,
        updates_per_epoch=math.ceil(batches / args.accumulate),
    )
    ema = ModelEmaV3(model, decay=args.model_ema_decay) if args.model_ema else None
    return Update(optimizer, scheduler, scaler, ema, args.accumulate, args.clip_grad, args.skip_nonfinite)


def be_deterministic() -> None:
    """Makes all results repeatable on the same machine; an operation that cannot be raises an error."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def adopt(folder: Path, args: argparse.Namespace, context: utils.Context) -> None:
    """Makes the checkpoint that --resume auto has found the newest of its folder.

    Raises:
        ValueError: the processes found different ones.
    """
    if len(set(utils.gather(args.resume))) > 1:
        raise ValueError(f"--output_dir {folder} is not the same folder for all processes: give a shared one")
    if args.resume and Path(args.resume).parent == folder:
        utils.by_main(context, lambda: checkpoints.set_aside(folder, Path(args.resume)))


def main() -> None:
    args, checkpoint = parse()
    if args.deterministic:
        be_deterministic()
    context = utils.start(args.device, args.seed)
    dataless = args.eval or args.demo or args.only_test_speed
    folder = Path(args.output_dir) if args.output_dir else None
    if folder:
        prepare = (
            checkpoints.open_folder if not dataless else partial(Path.mkdir, parents=True, exist_ok=True)
        )
        lock = utils.by_main(context, lambda: prepare(folder))  # noqa: F841  (as long as this function runs)
    utils.start_logging(context, folder / "train.log" if folder else None)
    if folder and not dataless:
        adopt(folder, args, context)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    precision = Precision.of(context.device, args.amp)._replace(memory_format=layout)
    config = {name: getattr(args, name) for name in datasets.DATA_CONFIG}

    # Data and model; the number of classes comes from the training folders, or from the checkpoint.
    source = datasets.DataSource.of(args, args.data_path)
    source = source._replace(download=args.download and context.is_local_main)
    with utils.main_first(context):
        trainset = None if dataless else datasets.build_dataset(source, "train")
    kwargs = model_kwargs(args, len(trainset.classes) if trainset else None)
    if checkpoint:
        model, name, kwargs = model_from_checkpoint(checkpoint, args.resume, args.model, kwargs)
    else:
        name, start = args.model, load_checkpoint(args.finetune) if args.finetune else None
        if start and "model_kwargs" not in start:
            kwargs = published_kwargs(name, start, args.finetune) | kwargs
        model = create_model(name, kwargs)
        if start:
            initialise_from(model, start["model"], args.finetune)
    if (args.test_speed or args.only_test_speed) and context.is_main:
        report_speed(model, name, precision, args.batch_size, folder)
    if args.only_test_speed:
        return
    classes = checkpoint.get("class_names") or (trainset.classes if trainset else None)
    valset = datasets.build_dataset(source, "val", datasets.eval_transform(model.img_size, config), classes)
    datasets.check_classes(valset, model.num_classes)
    model.to(context.device, memory_format=layout)
    loading = dict(num_workers=args.num_workers, pin_memory=args.pin_mem and context.device.type == "cuda")
    if args.num_workers:
        loading |= dict(prefetch_factor=args.prefetch_factor, persistent_workers=args.persistent_workers)
    bad_list = folder / "bad_images.txt" if folder else None
    share = (context.rank, context.world) if args.dist_eval and not args.demo else (0, 1)
    shard = loaders.Shard(valset, *share, args.max_bad_images, bad_list)
    val_loader = loaders.EvalLoader(shard, int(1.5 * args.batch_size), **loading)
    if args.demo:
        if context.is_main:
            target, thresholds = folder or Path("token_act_visualization"), [0.7] * (model.num_exits - 1)
            draw_classes(model, val_loader, config, thresholds, target, valset.classes)
        return
    if args.eval:
        for key, value in evaluate(model, val_loader, precision).items():
            log.info("%s %.3f", key, value)
        return

    ending = AS_BYTES if args.device_normalize else {}
    if args.fast_decode:
        trainset.side = 2 * model.img_size
    if args.token_label:
        augment = PairedTransform(model.img_size, config, **augmentation(args), **ending)
        trainset = datasets.TokenLabelled(trainset, args.token_label_data, augment)
    else:
        trainset.transform = datasets.train_transform(
            model.img_size, config, no_aug=args.no_aug, **augmentation(args), **ending
        )
    readable = Readable(trainset, args.max_bad_images, bad_list)
    train_loader = loaders.train_loader(
        readable,
        args.batch_size,
        repeats=3 if args.repeated_aug else 1,
        rank=context.rank,
        world_size=context.world,
        seed=args.seed,
        **loading,
    )
    if args.device_normalize:
        erased = 0.0 if args.no_aug else args.reprob
        train_loader = DeviceLoader(train_loader, context.device, config, erased, args.remode, args.recount)
    if mixes(args) and train_loader.batch_size % 2:
        raise ValueError("mixup pairs images and there is only one per process: --mixup 0 --cutmix 0")
    wrapped = model
    if args.compile:
        # Whole numbers that a schedule moves, as EViT's kept tokens, become symbols instead of new
        # compilations.
        torch._dynamo.config.allow_unspec_int_on_nn_module = True
        model.compile()
    if context.world > 1:  # before the moving average starts: this gives all processes the same weights
        ids = [context.device.index] if context.device.type == "cuda" else None
        wrapped = DistributedDataParallel(
            model, device_ids=ids, find_unused_parameters=model.varying_graph, broadcast_buffers=False
        )
    criterion, mixup = make_criterion(args, model)
    images = train_loader.batch_size * context.world
    update = make_update(args, model, images, len(train_loader), precision.scaler())
    constant = {
        "model_name": name,
        "model_kwargs": kwargs,
        "class_names": list(trainset.classes),
        "data_config": config,
        "args": vars(args),
    }
    run = Run(args, context, constant, model, update, images, len(train_loader))
    if checkpoint:
        with damage_told(args.resume):
            run.restore(checkpoint)
    log.info(
        "%s: %d parameters, %d training and %d validation images",
        name,
        run.parameters,
        len(trainset),
        len(valset),
    )

    with run:
        while run.epoch < run.epochs:
            epoch, start = run.epoch, run.progress.step * train_loader.batch_size
            train_loader.sampler.set_epoch(epoch, start)
            hooks = (run.on_step, run.progress, run.wishes, run.on_update)
            losses = train_one_epoch(
                wrapped, train_loader, criterion, update, epoch, precision, mixup, *hooks
            )
            losses |= {name: getattr(model, name) for name in model.knobs}
            readable.bad.report(context.device)
            if context.world > 1:  # every process has its own running statistics: one average is evaluated
                for part in [model] + ([update.ema.module] if update.ema else []):
                    distribute_bn(part, context.world, reduce=True)
            tested = evaluate(model, val_loader, precision)
            if update.ema is not None:
                tested |= evaluate(update.ema.module, val_loader, precision, "ema_")
            decides = "ema" if args.eval_ema and update.ema is not None else "test"
            exit_, top = 0 if args.eval_metric.endswith("_c") else model.num_exits - 1, args.eval_metric[3]
            score = tested[f"{decides}_exit{exit_}_acc{top}"]
            entry = {f"train_{key}": value for key, value in losses.items()} | tested
            run.end_epoch(entry, score)
            accuracy = ", ".join(
                f"{stage} {tested[f'test_exit{k}_acc1']:.2f}" for k, stage in enumerate(model.stage_names)
            )
            log.info("epoch %d: top-1 %s; best %.2f", epoch, accuracy, run.best)
            if run.board and args.picture_freq and epoch % args.picture_freq == 0:
                thresholds = [0.7] * (model.num_exits - 1)
                shown = val_loader.dataset.bad.read()[:8].tolist()
                sheet = explain(model, valset, shown, config, thresholds)
                pictures = draw_all(sheet, model.stage_names, constant["class_names"])
                run.board.add_image("regions", contact_sheet(pictures), epoch)


if __name__ == "__main__":
    utils.run_command(main)
