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

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import command_line
import datasets
import utils
from arguments import augmentation, mixes, model_kwargs, parse
from benchmarks.timing import report_speed
from checkpointing import folder as checkpoints
from checkpointing.run import Run
from checkpointing.schema import damage_told
from engine import Precision, Update, predict, train_one_epoch
from inference.pictures import contact_sheet
from loading import loaders
from loading.images import Readable
from loading.loaders import AS_BYTES, OnDevice
from loading.token_labels import PairedTransform, token_targets
from models import Adaptive, StageOutput
from models.exits import choose_exits, uniform_thresholds
from models.weights import create_model, foreign_kwargs, initialise_from, model_from_checkpoint
from utils import log
from visualize import draw_classes, explain


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
    source = dict(
        root=args.data_path,
        category=args.inat_category,
        download=args.download and context.is_local_main,
        use_lmdb=args.use_lmdb,
    )
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
    if args.num_workers:
        loading |= dict(prefetch_factor=args.prefetch_factor, persistent_workers=args.persistent_workers)
    bad_list = folder / "bad_images.txt" if folder else None
    share = (context.rank, context.world) if args.dist_eval and not args.demo else (0, 1)
    val_loader = loaders.eval_loader(
        valset,
        int(1.5 * args.batch_size),
        rank=share[0],
        world=share[1],
        max_bad=args.max_bad_images,
        bad_list=bad_list,
        **loading,
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
        world=context.world,
        seed=args.seed,
        **loading,
    )
    if args.device_normalize:
        erased = 0.0 if args.no_aug else args.reprob
        train_loader = OnDevice(train_loader, context.device, config, erased, args.remode, args.recount)
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
            losses |= model.schedules()
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
                page = np.asarray(contact_sheet(sheet, model.stage_names, constant["class_names"]))
                run.board.add_image("regions", page, epoch, dataformats="HWC")


if __name__ == "__main__":
    command_line.run_command(main)
