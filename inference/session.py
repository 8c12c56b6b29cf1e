"""A trained model opened from its checkpoint, and a session: the model, its data and a place for results."""

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
from checkpointing.format import (
    Results,
    add_to_checkpoint,
    add_to_json,
    as_lists,
    chosen_weights,
    digest,
    read_file,
    takes_results,
)
from datasets import DataSource
from engine import Precision, predict
from loading.loaders import AS_BYTES, DeviceLoader, EvalLoader, Shard, prefetched
from models import Adaptive, StageOutput
from models.cost import exit_gflops
from models.exits import Predictions
from models.weights import cast_weights, model_from_checkpoint
from utils import InputError, MainError, log


class TrainedModel(NamedTuple):
    """A model with what its checkpoint says of it.

    Attributes:
        model: with its weights, on the CPU until it is moved.
        name: registered name.
        kwargs: constructor arguments.
        config: how images become model input, see `datasets.DATA_CONFIG`.
        class_names: in the model's order; None where the checkpoint lacks them.
        checkpoint: its keys.
        weights: the key of the weights that were taken.
        digest: of these weights, see `checkpointing.format.digest`.
    """

    model: Adaptive
    name: str
    kwargs: dict[str, Any]
    config: dict[str, Any]
    class_names: list[str] | None
    checkpoint: dict[str, Any]
    weights: str
    digest: str

    def transform(self, as_bytes: bool = False) -> Callable:
        """Return the transform from image to model input, or to the bytes of which DeviceLoader makes it."""
        return datasets.eval_transform(self.model.img_size, self.config | (AS_BYTES if as_bytes else {}))

    def dataset(self, source: DataSource, split: str, as_bytes: bool = False) -> Dataset:
        """Open one split of a data set of the model's classes.

        Raises:
            FileNotFoundError: the folder, the split or its images are not there.
            InputError: its classes cannot be the model's, or see `datasets.build_dataset`.
        """
        dataset = datasets.build_dataset(source, split, self.transform(as_bytes), self.class_names)
        datasets.check_classes(dataset, self.model.num_classes)
        return dataset

    def which_weights(self) -> str:
        """Return which weights these are, as text."""
        epoch = f", epoch {self.checkpoint['epoch']}" if "epoch" in self.checkpoint else ""
        return f"the {'averaged' if self.weights == 'model_ema' else 'raw'} weights ({self.weights}){epoch}"

    def results_of(self, split: str) -> dict[str, Any]:
        """Return what results on a split are of, as files keep it under `results_of`.

        Beside weights, digest, epoch and split these are the settings that are not the checkpoint's own.
        """
        saved = self.checkpoint.get("model_kwargs", self.kwargs)
        settings = {name: value for name, value in self.kwargs.items() if saved.get(name) != value}
        images = datasets.data_config(self.model.recipe, self.checkpoint)
        settings |= {name: value for name, value in self.config.items() if images[name] != value}
        of = {"weights": self.weights, "digest": self.digest, "epoch": self.checkpoint.get("epoch")}
        of |= {"split": split} | {name: as_lists(value) for name, value in settings.items()}
        return {name: value for name, value in of.items() if value is not None}


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the types that inference computes in."""
    add = parser.add_argument
    add("--amp", choices=("none", "fp16", "bf16"), help="autocast; default: none, or the type of --weights")
    once = "cast weights once, to what autocast takes, instead of at every call; float32 parts stay"
    add("--weights", default="fp32", choices=("fp32", "fp16", "bf16"), help=once)
    utils.add_matmul_precision(parser)


def open_model(
    checkpoint: dict[str, Any],
    source: str,
    name: str | None = None,
    kwargs: dict[str, Any] | None = None,
    use_ema: bool | None = None,
    config: dict[str, Any] | None = None,
) -> TrainedModel:
    """Build the model of a checkpoint with the weights that `chosen_weights` names.

    What is given as `config` wins over the checkpoint's own. Other arguments and errors are those of
    `model_from_checkpoint`.
    """
    weights = chosen_weights(checkpoint, use_ema, source)
    asked = checkpoint, source, name, kwargs or {}
    model, name, kwargs = model_from_checkpoint(*asked, use_ema=weights == "model_ema")
    given, config = config or {}, datasets.data_config(model.recipe, checkpoint) | (config or {})
    if given:
        log.info("given for %s: %s", source, datasets.describe_config(given))
    classes, checksum = checkpoint.get("class_names"), digest(checkpoint[weights])
    return TrainedModel(model, name, kwargs, config, classes, checkpoint, weights, checksum)


class Loading(NamedTuple):
    """How images are loaded.

    Attributes:
        batch_size: images per batch and process.
        num_workers: loading processes.
        max_bad: images per split that may be unreadable.
        bad_list: file that lists them; None for the log.
        as_bytes: move images as bytes and normalise them on the device.
    """

    batch_size: int
    num_workers: int
    max_bad: int = 0
    bad_list: Path | None = None
    as_bytes: bool = False


class ResultFile(NamedTuple):
    """Where results go: into the checkpoint's own keys, or into a JSON file.

    Attributes:
        checkpoint: the checkpoint's file.
        json: takes the results instead, if it is given.
    """

    checkpoint: Path
    json: Path | None = None

    def check(self) -> None:
        """Check, before the work, that results can be written.

        Raises:
            InputError: the checkpoint has a layout that takes no results.
            OSError: the file cannot be written.
        """
        if self.json:
            return utils.check_writable(self.json, "name another JSON file with --results")
        if not takes_results(read_file(self.checkpoint)):
            raise InputError(f"{self.checkpoint} takes no results: name a JSON file for them with --results")
        utils.check_writable(self.checkpoint, "name a JSON file for the results with --results")

    def add(self, results: Results, extra: dict[str, Any], of: dict[str, Any], device: str) -> None:
        """Merge results into the file, see `checkpointing.format.merged`.

        Args:
            results: of the published keys.
            extra: goes to JSON alone.
            of: what was measured, see `TrainedModel.results_of`.
            device: on which, by name.

        Raises:
            MainError: the checkpoint no longer holds the weights that were measured, or cannot be written;
                the results are then in a JSON file beside it.
        """
        known = results.known() | {"device": device}
        if self.json:
            add_to_json(self.json, known | extra, of)
            return log.info("results written to %s", self.json)
        if not results.known():
            return
        try:
            add_to_checkpoint(self.checkpoint, known, of)
        except (InputError, OSError) as error:
            beside = self.checkpoint.with_suffix(f".{of['digest'][:8]}.json")
            add_to_json(beside, known | extra, of)
            raise MainError(f"{error}; the results are in {beside}") from error
        log.info("results of %s written into %s", of["weights"], self.checkpoint)


class Session(NamedTuple):
    """A trained model on its device, with its data.

    Attributes:
        trained: the model, in evaluation mode.
        source: the labelled data.
        split: of the data to evaluate on.
        context: of this process.
        precision: device and autocast type.
        loading: how images are loaded.
        results: where results go.
        gflops: cumulative cost of leaving at each exit, as counted.
    """

    trained: TrainedModel
    source: DataSource
    split: str
    context: utils.Context
    precision: Precision
    loading: Loading
    results: ResultFile
    gflops: list[float]

    @property
    def model(self) -> Adaptive:
        return self.trained.model

    def dataset(self, split: str | None = None) -> Dataset:
        """Open a split; default: the one to evaluate on."""
        return self.trained.dataset(self.source, split or self.split, self.loading.as_bytes)

    def loader(self, dataset: Dataset) -> DataLoader | DeviceLoader:
        """Load this process's images of a data set, in order."""
        context, loading = self.context, self.loading
        loader = EvalLoader(
            Shard(dataset, context.rank, context.world_size, loading.max_bad, loading.bad_list),
            loading.batch_size,
            num_workers=loading.num_workers,
            pin_memory=context.device.type == "cuda",
        )
        if loading.as_bytes:
            return DeviceLoader(loader, context.device, self.trained.config)
        return prefetched(loader, context.device)

    def predict(
        self, dataset: Dataset, on_batch: Callable[[Tensor, list[StageOutput]], None] | None = None
    ) -> Predictions:
        """Run all stages on a labelled data set, with a progress bar; see `engine.predict`."""
        loader = self.loader(dataset)
        with utils.progress(len(loader.dataset), shown=self.context.is_main) as bar:

            def after_batch(images: Tensor, outputs: list[StageOutput]) -> None:
                bar.update(len(images))
                if on_batch:
                    on_batch(images, outputs)

            return predict(self.model, loader, self.precision, after_batch)

    def store(self, results: Results, extra: dict[str, Any]) -> None:
        """Keep results, see `ResultFile.add`."""
        of, device = self.trained.results_of(self.split), utils.device_name(self.context.device)
        if self.precision.weights:
            of["weights_dtype"] = str(self.precision.weights).removeprefix("torch.")
        if (products := torch.get_float32_matmul_precision()) != "highest":
            of["matmul_precision"] = products
        utils.by_main(self.context, lambda: self.results.add(results, extra, of, device))

    def print_table(self, title: str, header: list[str], rows: list[list[Any]]) -> None:
        if self.context.is_main:
            print_table(title, header, rows)

    def print_exits(self, predictions: Predictions) -> list[float]:
        """Print accuracy and cost of every exit; return the top-1 accuracies."""
        summary, cost = predictions.summary(), predictions.gflops
        accuracy = [summary[f"exit{k}_acc1"] for k in range(self.model.num_exits)]
        means = self.gflops if cost is None else cost.double().mean(dim=0).tolist()
        rows = [
            [stage, means[k], accuracy[k], summary[f"exit{k}_acc5"]]
            for k, stage in enumerate(self.model.stage_names)
        ]
        self.print_table("all images to one exit", ["exit", "GFLOPs", "top-1 %", "top-5 %"], rows)
        if cost is not None:
            shares = torch.tensor([0, 0.1, 0.25, 0.5, 0.75, 0.9, 1], dtype=torch.float64)
            row = cost[:, -1].double().quantile(shares).tolist()
            header = ["least", "10 %", "25 %", "median", "75 %", "90 %", "most"]
            self.print_table(f"GFLOPs per image, full depth {self.gflops[-1]:.4g}", header, [row])
        return accuracy


def open_session(
    trained: TrainedModel,
    source: DataSource,
    split: str,
    context: utils.Context,
    precision: Precision,
    loading: Loading,
    results: ResultFile,
) -> Session:
    """Count a model's cost and move it to its device; the attributes are those of `Session`.

    Raises:
        InputError: the processes have read different weights.
    """
    if len(set(utils.gather(trained.digest))) > 1:
        raise InputError(f"{results.checkpoint} was replaced while the processes read it: start again")
    gflops = exit_gflops(trained.model)
    check_flops(Results.of(trained.checkpoint).flops, gflops)
    trained.model.to(context.device).eval()
    if precision.weights:
        cast_weights(trained.model, precision.weights)
    return Session(trained, source, split, context, precision, loading, results, gflops)


def check_flops(stored: list[float] | None, counted: list[float]) -> None:
    """Warn where a checkpoint's GFLOPs are not what the code runs."""
    if stored is None:
        return
    if len(stored) != len(counted) or any(
        abs(s - c) > 0.01 * c for s, c in zip(stored, counted, strict=False)
    ):
        texts = [", ".join(f"{value:.3f}" for value in values) for values in (stored, counted)]
        log.warning("warning: the checkpoint says %s GFLOPs, counted are %s; the count is used", *texts)


def print_table(title: str, header: list[str], rows: list[list[Any]]) -> None:
    print(f"\n{title}\n{tabulate(rows, header, floatfmt='.4g')}")
