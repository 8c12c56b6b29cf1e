"""Make token labels (Jiang et al. 2021, arXiv 2104.10858) for a folder's training images with any classifier.

    python scripts/make_token_labels.py --model nfnet_l0 --data-path IMAGENET --output labels
    python scripts/make_token_labels.py --checkpoint model_best.pth --data-path data/digits --output labels

Every image is resized to a square, so that the cells of its label cover all of it, in shares of its width
and height. The classifier's head is applied to each patch or feature-map cell, the logits are resized to the
label's grid, and the best classes of every cell are kept. Their scores are logits less the mean of the
classes left out (the logarithm of the mean exponential): with those at 0, where training puts them, a softmax
gives the classifier's own probabilities. Labels that exist are not made again.
"""

import _root as _root

import argparse
import math
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import Subset

import datasets
import utils
from checkpointing.format import chosen_weights, load_checkpoint, load_json, save_json
from loading.loaders import EvalLoader, Shard
from loading.token_labels import label_path
from models import AdaptiveViT
from models.weights import load_weights, model_from_checkpoint
from utils import NON_NEGATIVE_INT, POSITIVE_INT, InputError

LARGEST_HALF = 2048  # half precision holds whole numbers up to this one


def load_own(name: str, checkpoint: dict, source: str | None, options: dict) -> tuple[nn.Module, dict]:
    """Return a plain model of this project with the weights of a checkpoint, and its data config."""
    if source is None:
        raise InputError(f"{name} has no published weights: give --checkpoint")
    averaged = chosen_weights(checkpoint, source=source) == "model_ema"
    model, *_ = model_from_checkpoint(checkpoint, source, name, options, averaged)
    if type(model) is not AdaptiveViT:  # the others leave tokens out, or see the image in two resolutions
        raise InputError(f"{name} does not classify every patch: take a plain one such as deit_nano")
    return model, datasets.DATA_CONFIG | {"img_size": model.img_size}


def load_timm(name: str, checkpoint: dict, source: str | None, options: dict) -> tuple[nn.Module, dict]:
    """Return a model of timm with the weights of a checkpoint or its published ones, and its data config."""
    if source is None and not timm.models.is_model_pretrained(name):
        raise InputError(f"{name} has no published weights: give --checkpoint")
    published = timm.get_pretrained_cfg(name)
    side = options.get("img_size")
    kwargs = options if published and published.fixed_input_size else {}  # others take any size as they are
    if source is not None:
        heads = published.classifier if published else None
        head = f"{heads[0] if isinstance(heads, (list, tuple)) else heads}.weight"
        weights = checkpoint[chosen_weights(checkpoint, source=source)]
        if head in weights:
            kwargs = kwargs | {"num_classes": len(weights[head])}
    model = timm.create_model(name, pretrained=source is None, **kwargs)
    if source is not None:
        load_weights(model, weights, source)
    config = resolve_model_data_config(model)
    return model, config | {"img_size": side or config["input_size"][-1]}


def load_classifier(
    name: str | None, source: str | None, img_size: int | None
) -> tuple[nn.Module, dict, dict]:
    """Build the classifier.

    Args:
        name: registered model; default: the one that the checkpoint names.
        source: checkpoint; default: the weights that timm publishes.
        img_size: side of the model input in pixels; default: the model's own.

    Returns:
        The model in evaluation mode, its data config, and the checkpoint, {} without one.

    Raises:
        InputError: the model is unknown, has no weights, or does not fit them.
    """
    checkpoint = load_checkpoint(source) if source else {}
    name = name or checkpoint.get("model_name")
    if not name:
        raise InputError("no model given: name one with --model")
    if not timm.is_model(name):
        raise InputError(f"unknown model {name!r}: --model takes any model of timm or of this project")
    own = timm.model_entrypoint(name).__module__.startswith("models.")
    options = {"img_size": img_size} if img_size else {}
    model, config = (load_own if own else load_timm)(name, checkpoint, source, options)
    return model.eval(), config | {"name": name} | checkpoint.get("data_config", {}), checkpoint


def cell_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the classifier's logits for every patch or feature-map cell.

    Args:
        model: a plain AdaptiveViT, or a model of timm with `forward_features` and `forward_head`.
        images: [B,3,S,S].

    Returns:
        [B,K,h,w].

    Raises:
        InputError: the model has no square grid of features.
    """
    if isinstance(model, AdaptiveViT):
        x = model.patch_embed(images)
        x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1) + model.pos_embed  # [B,N,C]
        for block in model.blocks:
            x = block(x)
        logits = model.head(model.norm(x[:, 1:]))  # [B,P,K]
    else:
        features = model.forward_features(images)
        dims = features.ndim if isinstance(features, Tensor) else 0
        if dims == 4:  # every cell on its own is a 1 x 1 map: pooling then changes nothing
            channels_last = features.shape[1] != model.num_features == features.shape[3]
            cells = features if channels_last else features.permute(0, 2, 3, 1)  # [B,h,w,C]
            shape = (1, 1, -1) if channels_last else (-1, 1, 1)
            logits = model.forward_head(cells.flatten(0, 2).unflatten(1, shape)).unflatten(
                0, (len(images), -1)
            )
        elif dims == 3:  # a sequence of nothing but one patch pools to it, by class token or by mean
            prefix = getattr(model, "num_prefix_tokens", 0)
            patches = features[:, prefix:]
            copies = patches.flatten(0, 1)[:, None].expand(-1, prefix + 1, -1)
            logits = model.forward_head(copies).unflatten(0, patches.shape[:2])
        else:
            raise InputError(f"{type(model).__name__} has no features by patch: take another --model")
    side = math.isqrt(logits.shape[1])
    if side**2 != logits.shape[1]:
        raise InputError(
            f"{type(model).__name__} has {logits.shape[1]} patches, no square: take another --model"
        )
    return logits.transpose(1, 2).unflatten(2, (side, side))


def make_labels(logits: Tensor, size: int, top_k: int) -> Tensor:
    """Make labels [B,2,T,G,G] of logits [B,K,h,w]: scores and numbers of the best T classes of every cell.

    A class that is left out has the score 0, and e^0 = 1 is then the mean of e^logit over those left out.
    """
    logits = F.interpolate(logits.float(), (size, size), mode="bilinear")
    scores, classes = logits.topk(top_k, dim=1)
    left_out = logits.shape[1] - top_k
    if left_out:
        rest = logits.scatter(1, classes, -torch.inf).logsumexp(dim=1, keepdim=True)
        scores = scores - (rest - math.log(left_out))
    return torch.stack([scores, classes.to(scores.dtype)], dim=1)


def plan(data: datasets.Folder, output: Path, record: dict) -> list[tuple[int, Path]]:
    """List the numbers of the images that have no label yet, each with its file; make the folders.

    Raises:
        InputError: two images would share a label, or the output holds labels of another kind.
    """
    sources: dict[Path, Path] = {}
    for path, _ in data.samples:
        target = label_path(output, path)
        if target in sources:
            raise InputError(f"{path} and {sources[target]} have one name up to the first dot: rename one")
        sources[target] = path
    file = output / "labels.json"
    stored = load_json(file) if file.exists() else {}
    # Files of before do not name the classes.
    if stored and {"class_names": data.classes} | stored != record:
        raise InputError(f"{output} holds labels made otherwise (see {file}): give another --output")
    for folder in {target.parent for target in sources}:
        folder.mkdir(parents=True, exist_ok=True)
    if not stored:
        save_json(record, file)
    return [(i, target) for i, target in enumerate(sources) if not target.exists()]


def parse() -> argparse.Namespace:
    parser = utils.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", metavar="NAME", help="model of timm or of this project; default: the checkpoint's")
    add("--checkpoint", metavar="FILE", help="its weights; default: those that timm publishes")
    add("--data-path", required=True, metavar="DIR", help="folder with train/CLASS/IMAGE")
    add("--output", required=True, type=Path, metavar="DIR", help="where CLASS/IMAGE.pt go")
    add("--top-k", type=POSITIVE_INT, default=5, metavar="T", help="classes kept in every cell (5)")
    add("--size", type=POSITIVE_INT, default=18, metavar="G", help="side of the label in cells (18)")
    add("--img-size", type=POSITIVE_INT, metavar="PX", help="side of the model input; default: the model's")
    add("--batch-size", type=POSITIVE_INT, default=64, metavar="N")
    add(
        "--num_workers",
        "--workers",
        type=NON_NEGATIVE_INT,
        default=4,
        metavar="N",
        help="loading processes (4)",
    )
    datasets.add_bad_images(parser)
    utils.add_device(parser)
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    args = parse()
    context = utils.start(args.device, require_cuda=args.require_cuda)
    utils.start_logging(context)
    utils.log_device(context, args.device)
    device = context.device
    model, config, checkpoint = load_classifier(args.model, args.checkpoint, args.img_size)
    classes = model.num_classes
    if args.top_k > classes:
        raise InputError(f"--top-k is {args.top_k}: take 1 to {classes}, the classifier's classes")

    # The whole image, not the centre that is cut out in evaluation; the aspect ratio is given up for it.
    look = {key: config[key] for key in ("mean", "std", "interpolation")} | {
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    transform = datasets.eval_transform(config["img_size"], look)
    data = datasets.build_dataset(datasets.DataSource("IMNET", args.data_path), "train", transform)
    if len(data.classes) != classes or checkpoint.get("class_names", data.classes) != data.classes:
        raise InputError(
            f"{config['name']} knows other classes ({classes}) than {args.data_path} ({len(data.classes)}):"
            " labels name classes by number, so take a classifier of this very data set"
        )
    source = Path(args.checkpoint).name if args.checkpoint else None
    record = {"model": config["name"], "checkpoint": source, "img_size": config["img_size"]}
    record |= {"top_k": args.top_k, "size": args.size, "class_names": data.classes}
    todo = plan(data, args.output, record)

    model.to(device)
    dtype = torch.float16 if classes <= LARGEST_HALF else torch.float32
    unlabelled, done = Subset(data, [i for i, _ in todo]), 0
    bad = dict(max_bad=args.max_bad_images, bad_list=args.output / "bad_images.txt")
    loader = EvalLoader(Shard(unlabelled, **bad), args.batch_size, num_workers=args.num_workers)
    with utils.progress(len(data), initial=len(data) - len(todo)) as bar:
        for images, _ in loader:
            labels = make_labels(cell_logits(model, images.to(device)), args.size, args.top_k).to(dtype).cpu()
            if not labels.isfinite().all():
                raise utils.MainError(f"{config['name']} gives scores that are not finite numbers")
            for label, at in zip(labels, loader.dataset.read()[done : done + len(labels)], strict=True):
                # A clone: a row is saved with the memory of its whole batch.
                utils.write_atomically(todo[at][1], lambda file, label=label: torch.save(label.clone(), file))
            done += len(labels)
            bar.update(len(labels))
    loader.dataset.bad.report(device)
    unread = f", {len(todo) - done} images could not be read" if done < len(todo) else ""
    print(f"{args.output}: {done} token labels made, {len(data) - len(todo)} were there{unread}")


if __name__ == "__main__":
    utils.run_command(main)
