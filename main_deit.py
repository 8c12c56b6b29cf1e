"""Trains and evaluates the models: arguments -> data -> model -> optimizer -> epochs.

    python main_deit.py --model lf_deit_nano --data-path data/digits --output_dir output/nano
    torchrun --nproc_per_node=4 main_deit.py --model lf_deit_small --batch-size 256 --data-path IMAGENET \
        --location-stage-size 7 --dist-eval --output_dir output/lf_7x7

The defaults are DeiT's recipe, with what the model's own recipe changes.
"""

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

import datasets
import utils
from engine import Precision, Update, predict, train_one_epoch
from models import Adaptive, StageOutput, recipe_of
from models.a_vit import model_from_name
from models.exits import choose_exits, uniform_thresholds
from models.token_labels import PairedTransform, token_targets
from models.weights import (
    create_model,
    foreign_kwargs,
    initialise_from,
    load_weights,
    model_from_checkpoint,
)
from pictures import contact_sheet
from speed import report_speed
from utils import log
from visualize import draw_classes, explain

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
    "test_speed",
    "only_test_speed",
)
SHARES = ("drop_path", "hflip", "vflip", "reprob", "mixup_prob", "mixup_switch_prob", "smoothing")
SHARES += ("select_from", "coarse_only", "crop_pct", "model_ema_decay")
AMP = ("auto", "none", "fp16", "bf16")
RESIZE = ("bilinear", "bicubic", "lanczos", "nearest")
METRICS = ("top1_f", "top5_f", "top1_c", "top5_c")


def make_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument

    group = parser.add_argument_group("model")
    utils.add_model_arguments(group)
    add = group.add_argument
    add("--drop-path", type=float, default=0.1, help="stochastic depth rate of the last block")
    add("--finetune", metavar="FILE", help="start from the weights of a timm, DeiT or own checkpoint")
    add("--select-from", type=float, help="share of the epochs after which selection starts (LF-ViT: 0.77)")
    add("--coarse-only", type=float, help="share of the epochs that train the first stage alone")
    add("--dense-weight", type=float, help="weight of the patch tokens' loss (LV-ViT: 1)")

    add = parser.add_argument_group("data").add_argument
    add("data", nargs="?", metavar="DIR", help="another way to give --data-path")
    add("--data-path", "--data_url", metavar="DIR", help="folder with train/ and val/")
    add(
        "--data-set",
        default="IMNET",
        type=datasets.data_set_name,
        metavar="NAME",
        help=f"{', '.join(datasets.DATA_SETS)}, wds/NAME or hfds/NAME; IMNET is any tree of class folders",
    )
    add("--use-lmdb", action="store_true", help="read DIR/train.lmdb, see scripts/folder2lmdb.py")
    add("--inat-category", default="name", choices=datasets.INAT_CATEGORIES)
    add("--token-label", action="store_true", help="train on token labels, for models that take them")
    add("--token-label-data", metavar="DIR", help="their folder, see scripts/make_token_labels.py")
    add("--download", action="store_true", help="fetch CIFAR if it is not there")
    add("--num_workers", "--workers", type=int, default=10, help="loading processes")
    add("--pin-mem", action=OnOff, default=True, help="page-locked memory for faster transfer to a GPU")
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
    add("--resume", metavar="FILE", help="continue a run from its checkpoint")
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
    checkpoint = utils.load_checkpoint(source) if source else {}
    name = args.model or checkpoint.get("model_name", "")
    if args.demo:
        if not source:
            raise ValueError("--demo needs the weights to draw with: --finetune FILE")
        name = name or model_from_name(source)
    recipe = recipe_of(name or "")
    saved = checkpoint.get("args") if isinstance(checkpoint.get("args"), dict) else {}
    saved = {key: value for key, value in saved.items() if key in vars(args) and key not in OF_ONE_RUN}
    parser.set_defaults(**(datasets.data_config(recipe, checkpoint) | recipe | saved))
    args = parser.parse_args(argv)
    if args.demo:
        args.model, args.resume = name, source
    if args.warmup_epochs is None:
        args.warmup_epochs = min(5, args.epochs / 10)
    for name in ("batch_size", "epochs", "accumulate", "print_freq", "save_freq"):
        utils.check_range(f"--{name.replace('_', '-')}", getattr(args, name), 1)
    for name in SHARES:
        if getattr(args, name) is not None:
            utils.check_range(f"--{name.replace('_', '-')}", getattr(args, name), 0, 1)
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
    kwargs = utils.model_arguments(args) | {"drop_path_rate": args.drop_path}
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if args.select_from is not None:
        kwargs["select_from_epoch"] = args.select_from * args.epochs
    if args.dense_weight is not None:
        kwargs["dense_weight"] = args.dense_weight
    if args.coarse_only is not None:
        kwargs["coarse_only_epochs"] = args.coarse_only * args.epochs
    return kwargs


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
    return Update(optimizer, scheduler, scaler, ema, args.accumulate, args.clip_grad)


class Run:
    """What a training run leaves behind: checkpoints, log.txt, TensorBoard; only the main process writes."""

    def __init__(self, args: argparse.Namespace, context: utils.Context, constant: dict):
        self.args, self.context, self.constant = args, context, constant
        self.folder = Path(args.output_dir) if args.output_dir else None
        self.board = SummaryWriter(self.folder / "tensorboard") if self.folder and context.is_main else None
        self.best = -1.0

    def begin(self, images: int, steps: int, epochs: range, optimizer: torch.optim.Optimizer) -> None:
        """Sets up the progress display, over all epochs of `steps` batches of so many images."""
        self.steps, self.optimizer = steps, optimizer
        self.bar = utils.progress(images * steps * len(epochs), shown=self.context.is_main)

    def step(self, epoch: int, step: int, images: int, losses: dict[str, float]) -> None:
        """Moves the bar by a batch; every --print-freq batches writes a line and to TensorBoard."""
        self.bar.update(images * self.context.world)
        self.bar.set_description(f"epoch {epoch} loss {losses['loss']:.3f}", refresh=False)
        if not self.context.is_main or (step % self.args.print_freq and step + 1 < self.steps):
            return
        rate, left = utils.rate_and_left(self.bar)
        numbers = losses | {"lr": self.optimizer.param_groups[0]["lr"]}
        text = " ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        log.info("epoch %d [%d/%d] %s %.0f img/s %s left", epoch, step + 1, self.steps, text, rate, left)
        if self.board is not None:
            for name, value in (numbers | {"images_per_second": rate}).items():
                self.board.add_scalar(f"step/{name}", value, epoch * self.steps + step)

    def save(self, model: nn.Module, update: Update, epoch: int, score: float) -> None:
        """Writes checkpoint.pth, and model_best.pth if the score is the best so far."""
        rng = utils.gather(utils.rng_state())
        improved, self.best = score > self.best, max(score, self.best)
        if not (self.folder and self.context.is_main):
            return
        checkpoint = self.constant | {
            "model": model.state_dict(),
            "optimizer": update.optimizer.state_dict(),
            "lr_scheduler": update.scheduler.state_dict(),
            "scaler": update.scaler.state_dict(),
            "epoch": epoch,
            "best": self.best,
            "rng": rng,
        }
        if update.ema is not None:
            checkpoint["model_ema"] = update.ema.module.state_dict()
        final = epoch + 1 == self.args.epochs + self.args.cooldown_epochs
        if final or (epoch + 1) % self.args.save_freq == 0:
            utils.save_checkpoint(checkpoint, self.folder / "checkpoint.pth")
        if improved:
            utils.save_checkpoint(checkpoint, self.folder / "model_best.pth")

    def restore(self, checkpoint: dict, update: Update) -> int:
        """Puts optimizer, scaler, average, generators and score back; returns the next epoch.

        The schedule follows from the epoch, so that a run may be continued with more --epochs.
        """
        if "optimizer" not in checkpoint:
            raise ValueError(f"{self.args.resume} holds weights only; start from it with --finetune")
        update.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint.get("scaler"):
            update.scaler.load_state_dict(checkpoint["scaler"])
        if update.ema is not None and checkpoint.get("model_ema"):
            load_weights(update.ema.module, checkpoint["model_ema"], self.args.resume)
        self.best = checkpoint.get("best", -1.0)
        states = checkpoint.get("rng", [])
        if len(states) == self.context.world:
            utils.restore_rng(states[self.context.rank])
        else:
            log.info("the checkpoint is of %d processes: random numbers start anew", len(states))
        return checkpoint["epoch"] + 1

    def write(self, entry: dict, epoch: int, parameters: int) -> None:
        """Appends an epoch to log.txt and to TensorBoard."""
        if self.folder and self.context.is_main:
            with open(self.folder / "log.txt", "a") as file:
                file.write(json.dumps(entry | {"epoch": epoch, "n_parameters": parameters}) + "\n")
            for name, value in entry.items():
                self.board.add_scalar(name.replace("_", "/", 1), value, epoch)
            self.board.flush()


def evaluate(model: nn.Module, loader, precision: Precision, prefix: str = "test_") -> dict[str, float]:
    """Accuracy and loss of every exit, and the share of images that three thresholds let go early."""
    model.set_epoch(math.inf)  # what is measured is what inference will do
    sums: dict[str, float] = {"images": 0.0}

    def add_statistics(images: torch.Tensor, outputs: list[StageOutput]) -> None:
        sums["images"] += len(images)
        for name, value in model.statistics(outputs).items():
            sums[name] = sums.get(name, 0.0) + len(images) * value.item()

    predictions = predict(model, loader, precision, add_statistics)
    entry = {prefix + name: value for name, value in predictions.summary().items()}
    parts = utils.gather(sums)
    images = sum(part["images"] for part in parts)
    for name in sorted(parts[0].keys() - {"images"}):
        entry[prefix + name] = sum(part.get(name, 0.0) for part in parts) / images
    if predictions.gflops is not None:
        entry[prefix + "gflops"] = predictions.gflops[:, -1].mean().item()
    thresholds = uniform_thresholds(11, model.num_exits)[[5, 7, 9]]  # 0.5, 0.7, 0.9
    for percent, exits in zip((50, 70, 90), choose_exits(predictions.confidence, thresholds), strict=True):
        for k in range(model.num_exits - 1):
            entry[f"{prefix}exit{k}_share_at_{percent}"] = (exits == k).double().mean().item()
    return entry


def main() -> None:
    args, checkpoint = parse()
    context = utils.start(args.device, args.seed)
    folder = Path(args.output_dir) if args.output_dir else None
    if folder and context.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    utils.start_logging(context, folder / "train.log" if folder else None)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    precision = Precision.of(context.device, args.amp)._replace(memory_format=layout)
    config = {name: getattr(args, name) for name in datasets.DATA_CONFIG}

    # Data and model; the number of classes comes from the training folders, or from the checkpoint.
    source = dict(
        root=args.data_path,
        category=args.inat_category,
        download=args.download and context.is_local_main,
        use_lmdb=args.use_lmdb,
    )
    dataless = args.eval or args.demo or args.only_test_speed
    with utils.main_first(context):
        trainset = None if dataless else datasets.build_dataset(args.data_set, split="train", **source)
    kwargs = model_kwargs(args, len(trainset.classes) if trainset else None)
    if checkpoint:
        model, name, kwargs = model_from_checkpoint(checkpoint, args.resume, args.model, kwargs)
    else:
        name, start = args.model, utils.load_checkpoint(args.finetune) if args.finetune else None
        if start and "model_kwargs" not in start:
            kwargs = foreign_kwargs(name, start, args.finetune) | kwargs
        model = create_model(name, kwargs)
        if start:
            initialise_from(model, start["model"], args.finetune)
    if (args.test_speed or args.only_test_speed) and context.is_main:
        report_speed(model, name, precision, args.batch_size, folder)
    if args.only_test_speed:
        return
    classes = checkpoint.get("class_names") or (trainset.classes if trainset else None)
    valset = datasets.build_dataset(
        args.data_set,
        split="val",
        transform=datasets.eval_transform(model.img_size, config),
        classes=classes,
        **source,
    )
    datasets.check_classes(valset, model.num_classes)
    model.to(context.device, memory_format=layout)
    loading = dict(workers=args.num_workers, pin_memory=args.pin_mem and context.device.type == "cuda")
    share = (context.rank, context.world) if args.dist_eval and not args.demo else (0, 1)
    val_loader = datasets.eval_loader(
        valset, int(1.5 * args.batch_size), rank=share[0], world=share[1], **loading
    )
    if args.demo:
        if context.is_main:
            target, thresholds = folder or Path("token_act_visualization"), [0.7] * (model.num_exits - 1)
            draw_classes(model, val_loader, config, thresholds, target, valset.classes)
        return
    if args.eval:
        for key, value in evaluate(model, val_loader, precision).items():
            log.info("%s %.3f", key, value)
        return

    if args.token_label:
        augment = PairedTransform(model.img_size, config, **augmentation(args))
        trainset = datasets.TokenLabelled(trainset, args.token_label_data, augment)
    else:
        trainset.transform = datasets.train_transform(
            model.img_size, config, no_aug=args.no_aug, **augmentation(args)
        )
    train_loader = datasets.train_loader(
        trainset,
        args.batch_size,
        repeats=3 if args.repeated_aug else 1,
        rank=context.rank,
        world=context.world,
        seed=args.seed,
        **loading,
    )
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
    run = Run(
        args,
        context,
        {
            "model_name": name,
            "model_kwargs": kwargs,
            "class_names": list(trainset.classes),
            "data_config": config,
            "args": vars(args),
        },
    )
    first = run.restore(checkpoint, update) if checkpoint else 0
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info(
        "%s: %d parameters, %d training and %d validation images",
        name,
        parameters,
        len(trainset),
        len(valset),
    )

    epochs = range(first, args.epochs + args.cooldown_epochs)
    run.begin(images, len(train_loader), epochs, update.optimizer)
    for epoch in epochs:
        train_loader.sampler.set_epoch(epoch)
        on_step = partial(run.step, epoch)
        losses = train_one_epoch(wrapped, train_loader, criterion, update, epoch, precision, mixup, on_step)
        losses |= model.schedules()
        if (
            context.world > 1
        ):  # every process has its own running statistics: one average is evaluated and saved
            for part in [model] + ([update.ema.module] if update.ema else []):
                distribute_bn(part, context.world, reduce=True)
        tested = evaluate(model, val_loader, precision)
        if update.ema is not None:
            tested |= evaluate(update.ema.module, val_loader, precision, "ema_")
        decides = "ema" if args.eval_ema and update.ema is not None else "test"
        exit_, top = 0 if args.eval_metric.endswith("_c") else model.num_exits - 1, args.eval_metric[3]
        score = tested[f"{decides}_exit{exit_}_acc{top}"]
        run.save(model, update, epoch, score)
        entry = {f"train_{key}": value for key, value in losses.items()} | tested
        run.write(entry, epoch, parameters)
        accuracy = ", ".join(
            f"{stage} {tested[f'test_exit{k}_acc1']:.2f}" for k, stage in enumerate(model.stage_names)
        )
        log.info("epoch %d: top-1 %s; best %.2f", epoch, accuracy, run.best)
        if run.board and args.picture_freq and epoch % args.picture_freq == 0:
            sheet = explain(model, valset, range(min(8, len(valset))), config, [0.7] * (model.num_exits - 1))
            page = np.asarray(contact_sheet(sheet, model.stage_names, run.constant["class_names"]))
            run.board.add_image("regions", page, epoch, dataformats="HWC")


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


if __name__ == "__main__":
    utils.run_command(main)
