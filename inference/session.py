"""A loaded model with its data: what every mode of dynamic_inference.py works on, and how they show and keep
results."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import datasets
import utils
from checkpointing.format import Results, add_to_checkpoint, load_checkpoint, load_json, read_file, save_json
from engine import Precision, predict
from loading.loaders import AS_BYTES, DeviceLoader, EvalLoader, Shard
from models import Adaptive, flags
from models.cost import exit_gflops
from models.exits import Predictions
from models.weights import model_from_checkpoint
from utils import log


class Session(NamedTuple):
    """A loaded model with everything the modes need."""

    args: argparse.Namespace
    context: utils.Context
    checkpoint: dict[str, Any]
    model: Adaptive
    config: dict[str, Any]
    precision: Precision
    gflops: list[float]

    def dataset(self, split: str) -> Dataset:
        source = datasets.DataSource.of(self.args, self.args.data_url)
        classes = self.checkpoint.get("class_names")
        dataset = datasets.build_dataset(source, split, self.transform(), classes)
        datasets.check_classes(dataset, self.model.num_classes)
        return dataset

    def transform(self) -> Callable:
        """To model input, or with --device-normalize to the bytes of which `loader` makes it."""
        ending = AS_BYTES if self.args.device_normalize else {}
        return datasets.eval_transform(self.model.img_size, self.config | ending)

    def loader(self, dataset: Dataset) -> DataLoader | DeviceLoader:
        context, args = self.context, self.args
        beside = args.results or args.output
        bad_list = Path(beside).with_name("bad_images.txt") if beside else None
        loader = EvalLoader(
            Shard(dataset, context.rank, context.world, args.max_bad_images, bad_list),
            args.batch_size,
            num_workers=args.num_workers,
            pin_memory=context.device.type == "cuda",
        )
        return DeviceLoader(loader, context.device, self.config) if args.device_normalize else loader

    def predict(
        self, dataset: Dataset, on_batch: Callable[[Tensor, list], None] | None = None
    ) -> Predictions:
        """All exits on a labelled data set, with a progress bar."""
        loader = self.loader(dataset)
        with utils.progress(len(loader.dataset), shown=self.context.is_main) as bar:

            def seen(images: Tensor, outputs: list) -> None:
                bar.update(len(images))
                if on_batch:
                    on_batch(images, outputs)

            return predict(self.model, loader, self.precision, seen)

    def thresholds(self) -> list[float]:
        return [self.args.threshold] * (self.model.num_exits - 1)


def open_session(args: argparse.Namespace, context: utils.Context) -> Session:
    checkpoint = load_checkpoint(args.checkpoint_path)
    stores = not (args.results or args.images or args.budget is not None)
    if stores and not isinstance(read_file(Path(args.checkpoint_path)).get("model"), dict):
        raise ValueError(f"{args.checkpoint_path} takes no results: name a JSON file for them with --results")
    model, name, _ = model_from_checkpoint(
        checkpoint, args.checkpoint_path, args.model, flags.constructor_kwargs(vars(args)), args.use_ema
    )
    gflops = exit_gflops(model)
    check_flops(Results.of(checkpoint).flops, gflops)
    model.to(context.device).eval()
    config = datasets.data_config(model.recipe, checkpoint)
    return Session(args, context, checkpoint, model, config, Precision.of(context.device, args.amp), gflops)


def check_flops(stored: list[float] | None, counted: list[float]) -> None:
    """Warns where a checkpoint's GFLOPs are not what the code runs."""
    if stored is None:
        return
    if len(stored) != len(counted) or any(
        abs(s - c) > 0.01 * c for s, c in zip(stored, counted, strict=False)
    ):
        said, found = (", ".join(f"{value:.3f}" for value in values) for values in (stored, counted))
        log.warning("warning: the checkpoint says %s GFLOPs, counted are %s; the count is used", said, found)


def show(title: str, header: list[str], rows: list[list[Any]]) -> None:
    """Prints a table."""
    print(f"\n{title}\n{tabulate(rows, header, floatfmt='.4g')}")


def store(session: Session, results: Results, extra: dict[str, Any]) -> None:
    """Merges results into the checkpoint, or writes them with `extra` to --results."""
    args = session.args
    if not session.context.is_main:
        return
    if args.results:
        path = Path(args.results)
        path.parent.mkdir(parents=True, exist_ok=True)
        old = load_json(path) if path.exists() else {}
        save_json(old | results.known() | extra, path)
        log.info("results written to %s", path)
    elif results.known():
        add_to_checkpoint(Path(args.checkpoint_path), results.known())
        log.info("results written into %s", args.checkpoint_path)


def show_exits(session: Session, predictions: Predictions) -> list[float]:
    """Prints accuracy and cost of every exit; returns the top-1 accuracies."""
    found = predictions.summary()
    accuracy = [found[f"exit{k}_acc1"] for k in range(session.model.num_exits)]
    cost = predictions.gflops
    means = session.gflops if cost is None else cost.double().mean(dim=0).tolist()
    rows = [
        [stage, means[k], accuracy[k], found[f"exit{k}_acc5"]]
        for k, stage in enumerate(session.model.stage_names)
    ]
    if session.context.is_main:
        show("all images to one exit", ["exit", "GFLOPs", "top-1 %", "top-5 %"], rows)
        if cost is not None:
            shares = torch.tensor([0, 0.1, 0.25, 0.5, 0.75, 0.9, 1], dtype=torch.float64)
            row = cost[:, -1].double().quantile(shares).tolist()
            header = ["least", "10 %", "25 %", "median", "75 %", "90 %", "most"]
            show(f"GFLOPs per image, full depth {session.gflops[-1]:.4g}", header, [row])
    return accuracy
