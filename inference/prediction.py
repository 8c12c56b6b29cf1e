"""Prediction on unlabelled images: one line of CSV for each."""

import csv
import sys
from pathlib import Path
from typing import Any

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


def predict_files(session: Session, path: str, threshold: float, output: Path | None = None) -> None:
    """Predict on an image, or on every image below a folder.

    Args:
        session: with any source of labelled data, which is not read.
        path: of the image or folder.
        threshold: confidence that lets an image leave early.
        output: file of the table; default: standard output.
    """
    files = datasets.Files(path, session.trained.transform(session.loading.as_bytes))
    loader = session.loader(files)
    lines: list[tuple[int, list[str]]] = []  # number of the image in `files`, cells
    for images, numbers in loader:
        images = images.to(session.context.device)
        lines += predict_batch(session, files, images, numbers.tolist(), threshold)
    # Images that cannot be read have a line without cells.
    bad = loader.dataset.bad
    bad.report(session.context.device)
    lines += [(number, [""] * 5) for number in bad.numbers() if session.context.is_main]
    lines = sorted(line for part in utils.gather(lines) for line in part)
    if not session.context.is_main:
        return
    table = [HEADER] + [[str(files.paths[number]), *cells] for number, cells in lines]
    if output:
        utils.write_atomically(output, lambda temporary: write_csv(table, temporary))
        log.info("%d predictions written to %s", len(lines), output)
    else:
        csv.writer(sys.stdout).writerows(table)


def predict_batch(
    session: Session, files: datasets.Files, images: Tensor, numbers: list[int], threshold: float
) -> list[tuple[int, list[str]]]:
    """Return number and cells of each image [B,3,S,S] of a batch."""
    model, trained, gflops = session.model, session.trained, session.gflops
    cells: list[list[str]] = [[] for _ in images]
    dtype = utils.widest_float(images.device)
    spent = torch.zeros(len(images), dtype=dtype, device=images.device)  # GFLOPs so far
    with session.precision.autocast():
        steps = list(cascade(model, images, trained.thresholds(threshold)))
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


def write_csv(table: list[list[Any]], path: Path) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(table)
