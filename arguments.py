"""Command line of main_deit.py: flags over the checkpoint to resume over the model's recipe over DeiT's."""

import argparse
from pathlib import Path

import command_line
import datasets
import utils
from checkpointing import folder as checkpoints
from checkpointing.schema import check_arguments
from models import recipe_of
from models.a_vit import model_from_name

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
    parser = command_line.Parser(description="Trains and evaluates the models.")
    group = parser.add_argument_group("model")
    command_line.add_model_arguments(group)
    add = group.add_argument
    add("--drop-path", type=float, default=0.1, help="stochastic depth rate of the last block")
    add("--finetune", metavar="FILE", help="start from the weights of a timm, DeiT or own checkpoint")
    add("--select-from", type=float, help="share of the epochs after which selection starts (LF-ViT: 0.77)")
    add("--coarse-only", type=float, help="share of the epochs that train the first stage alone")
    add("--dense-weight", type=float, help="weight of the patch tokens' loss (LV-ViT: 1)")

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
    command_line.add_device_normalize(group)
    add(
        "--fast-decode",
        action="store_true",
        help="decode training JPEGs of four or more times the model input's side at a part of their size;"
        " slightly other pixels",
    )
    command_line.add_bad_images(group)
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
        checkpoint = utils.load_checkpoint(source) if source else {}
    name = args.model or checkpoint.get("model_name", "")
    if args.demo:
        if not source:
            raise ValueError("--demo needs the weights to draw with: --finetune FILE")
        name = name or model_from_name(source)
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
                command_line.check_range(f"--{name.replace('_', '-')}", getattr(args, name), *bounds)
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
    kwargs = command_line.model_arguments(args) | {"drop_path_rate": args.drop_path}
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if args.select_from is not None:
        kwargs["select_from_epoch"] = args.select_from * args.epochs
    if args.dense_weight is not None:
        kwargs["dense_weight"] = args.dense_weight
    if args.coarse_only is not None:
        kwargs["coarse_only_epochs"] = args.coarse_only * args.epochs
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
