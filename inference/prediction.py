"""Prediction on unlabelled images: one line of CSV for each."""

import csv
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

import datasets
import utils
from engine import cascade
from inference.session import Session
from models import Adaptive, StageOutput
from models.exits import confidence
from models.selection import bounding_box
from utils import log

HEADER = ["file", "class", "confidence", "exit", "GFLOPs", "region"]


EMPTY = [""] * (len(HEADER) - 1)  # cells of an image that cannot be read
Line = tuple[int, list[str]]  # number of the image in its folder, cells


def predict_files(session: Session, path: str, thresholds: list[float], output: Path | None = None) -> None:
    """Predict on an image, or on every image below a folder.

    Args:
        session: with any source of labelled data, which is not read.
        path: of the image or folder.
        thresholds: confidences that let an image leave early, one per early exit.
        output: file of the table; default: standard output.
    """
    files = datasets.Files(path, session.trained.transform(session.loading.as_bytes))
    loader, device = session.loader(files), session.context.device
    batches = (
        predict_batch(session, files, images.to(device), numbers.tolist(), thresholds)
        for images, numbers in loader
    )
    steps = lines_in_order(batches, len(files), session.context.world_size)
    if session.context.is_main:
        with csv_table(output) as write:
            for lines in steps:
                write([[str(files.paths[number]), *cells] for number, cells in lines])
            loader.dataset.bad.report(device)
        if output:
            log.info("%d predictions written to %s", len(files), output)
    else:
        for _ in steps:
            pass
        loader.dataset.bad.report(device)


def lines_in_order(batches: Iterator[list[Line]], count: int, world_size: int) -> Iterator[list[Line]]:
    """Bring the lines of all processes into the order of the images, each once none before it is missing.

    All processes have to exhaust this. An image without a line, because it cannot be read, gets an empty one.

    Args:
        batches: of this process, each with a line for every image read, in order.
        count: images of all processes.
        world_size: number of processes.

    Yields:
        After each step of all processes, the next lines.
    """
    cells: dict[int, list[str]] = {}
    first, reached = 0, [-1] * world_size  # number of the next line, and of each process's last
    while first < count:
        for rank, lines in enumerate(utils.gather(next(batches, None))):
            cells |= lines or []
            reached[rank] = lines[-1][0] if lines else count - 1
        after = min(reached) + 1
        yield [(number, cells.pop(number, EMPTY)) for number in range(first, after)]
        first = after


@contextmanager
def csv_table(output: Path | None) -> Iterator[Callable[[list[list[str]]], None]]:
    """Write the header, and give a function that writes rows at once: to standard output, or to a file.

    Names that are not UTF-8 keep their bytes. The file is OUTPUT.partial until the body ends well; the rows
    that it has when the body fails or is interrupted stay there.
    """
    encoding = dict(encoding="utf-8", errors="surrogateescape")
    if output is None:
        if isinstance(sys.stdout, TextIOWrapper):  # not what a caller may have put in its place
            sys.stdout.reconfigure(**encoding)
        write_rows([HEADER], sys.stdout)
        yield lambda rows: write_rows(rows, sys.stdout)
        return
    partial = output.with_name(f"{output.name}.partial")
    with open(partial, "w", newline="", **encoding) as file:
        write_rows([HEADER], file)
        empty = file.tell()
        try:
            yield lambda rows: write_rows(rows, file)
        except BaseException:
            if file.tell() > empty:
                log.warning("the predictions up to here are in %s", partial)
            else:
                partial.unlink()
            raise
    utils.sync(partial)
    os.replace(partial, output)


def write_rows(rows: list[list[str]], file: TextIO) -> None:
    csv.writer(file).writerows(rows)
    file.flush()


def predict_batch(
    session: Session, files: datasets.Files, images: Tensor, numbers: list[int], thresholds: list[float]
) -> list[Line]:
    """Return number and cells of each image [B,3,S,S] of a batch."""
    model, trained, gflops = session.model, session.trained, session.gflops
    cells: list[list[str]] = [[] for _ in images]
    dtype = utils.widest_float(images.device)
    spent = torch.zeros(len(images), dtype=dtype, device=images.device)  # GFLOPs so far
    with session.precision.autocast():
        steps = list(cascade(model, images, thresholds))
    for k, rows, output, _ in steps:
        own = model.image_gflops(k, output.info)
        spent[rows] += gflops[k] - (gflops[k - 1] if k else 0) if own is None else own
        best, top = output.logits.argmax(dim=-1).tolist(), confidence(output.logits).tolist()
        regions = regions_of(model, output)
        for at, row in enumerate(rows.tolist()):
            label = trained.class_names[best[at]] if trained.class_names else str(best[at])
            cells[row] = [label, f"{top[at]:.4f}", model.stage_names[k], f"{spent[row]:.4f}", ""]
            if regions is not None:
                box = files.in_original(numbers[row], regions[at].tolist(), model.img_size, trained.config)
                cells[row][-1] = " ".join(map(str, box))
    return list(zip(numbers, cells, strict=True))


def regions_of(model: Adaptive, output: StageOutput) -> Tensor | None:
    """Return the region of each image in input pixels, [B,4], or the box around its refined patches."""
    picture = model.picture(output.info)
    if picture.region is not None or picture.refined is None:
        return picture.region
    return model.patch_size * bounding_box(picture.refined, model.img_size // model.patch_size)
