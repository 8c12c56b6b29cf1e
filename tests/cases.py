"""What several tests need: reference cases, and the commands as a shell or this process runs them."""

import csv
import importlib
import json
import os
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).parents[1]
VECTORS = Path(__file__).parent / "vectors"


def draw(key: str, entry: list, seed: int) -> np.ndarray:
    """One tensor of a case: weights are not stored, they follow from their name and the seed."""
    shape, mean, std, *dtype = entry
    if dtype:
        return np.zeros(shape, dtype[0])
    generator = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
    value = (generator.standard_normal(tuple(shape)) * std + mean).astype(np.float32)
    return np.abs(value) + np.float32(0.1) if key.endswith("running_var") else value


def load_case(stem: str) -> tuple[dict[str, Any], dict[str, Tensor], Tensor, dict[str, np.ndarray]]:
    """Reads a case of tests/vectors: its description, state dict, images [B,3,S,S] and stored tensors."""
    path = VECTORS / stem
    meta, tensors = json.loads(path.with_suffix(".json").read_text()), load_file(f"{path}.safetensors")
    weights = {
        key: torch.from_numpy(np.asarray(draw(key, entry, meta["seed"])))
        for key, entry in meta["weights"].items()
    }
    blocks = tensors["input.image_blocks"].astype(np.float32) * np.float32(meta["image_scale"])
    image = blocks.repeat(meta["block_factor"], axis=2).repeat(meta["block_factor"], axis=3)
    return meta, weights, torch.from_numpy(image), tensors


REGISTERED = {"lf_deit": "lf_deit_small", "cf_deit": "cf_deit_small", "cf_lvvit": "cf_lvvit_small"}


def build_case(stem: str) -> tuple[Any, dict[str, Any], Tensor, dict[str, Tensor]]:
    """A case's model with its weights, in evaluation mode; its description, images and expected values."""
    import timm

    import models  # noqa: F401  (registers the models)

    meta, weights, image, tensors = load_case(stem)
    ctor, name = meta["ctor"], REGISTERED[meta["family"]]
    same = [
        "patch_size",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
        "num_classes",
        "region_size",
        "alpha",
    ]
    kwargs = {key: ctor[key] for key in same if key in ctor}
    size = "location_stage_size" if name.startswith("lf") else "coarse_stage_size"
    model = timm.create_model(name, **kwargs, **{size: ctor["coarse_size"]})
    model.load_state_dict(weights)
    return model.eval(), meta, image, {key: torch.from_numpy(value) for key, value in tensors.items()}


@torch.inference_mode()
def check_outputs(stem: str) -> None:
    """A two-stage case in evaluation mode: logits, class attention, refined patches, early exit."""
    from engine import early_exit

    model, meta, image, expected = build_case(stem)
    first, second = model(image)
    torch.testing.assert_close(first.logits, expected["output.stage0"], atol=1e-4, rtol=0)
    torch.testing.assert_close(second.logits, expected["output.stage1"], atol=1e-4, rtol=0)
    torch.testing.assert_close(first.info["cls_attn"], expected["output.class_attention"], atol=1e-6, rtol=0)
    assert torch.equal(second.info["kept"], expected["output.region"].long())  # in the published order
    logits, exits = early_exit(model, image, [meta["threshold"]])
    torch.testing.assert_close(logits, expected["output.early_exit"], atol=1e-4, rtol=0)
    assert exits.tolist() == expected["output.no_exit"].tolist()


def contents(root: Path) -> dict[str, bytes]:
    """Reads every file below `root`."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def read_boxes(root: Path) -> list[dict[str, str]]:
    """Reads the rows of boxes.csv."""
    with open(root / "boxes.csv", newline="") as file:
        return list(csv.DictReader(file))


def published_shapes(name: str) -> dict[str, list[int]]:
    """Names and shapes of a published state dict."""
    manifest = json.loads((VECTORS / f"manifest_{name}.json").read_text())
    entries = manifest["state_dict"].items()
    return {key: entry["shape"] if isinstance(entry, dict) else entry for key, entry in entries}


def unset(name: str, **kwargs: Any) -> torch.nn.Module:
    """A model whose weights are all zeros: to draw those of a full size takes longer than to count."""
    import timm

    import models  # noqa: F401  (registers the models)

    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    model.to_empty(device="cpu")
    for value in (*model.parameters(), *model.buffers()):
        value.data.zero_()
    return model


def run(*argv: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs this Python on the given arguments from the repository's root."""
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def call(name: str, *argv: object) -> None:
    """Calls a command's `main` in this process, where it succeeds and what it prints does not matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
        try:
            importlib.import_module(name).main()
        finally:
            close_logs()


def close_logs() -> None:
    """Closes what a command logs to: it holds the standard error of a test."""
    import utils

    for handler in utils.log.handlers[:]:
        utils.log.removeHandler(handler)
        handler.close()
    utils.log.filters.clear()
    utils.log.propagate = True


class Ended(NamedTuple):
    """How a command ended: its exit code and what it printed."""

    code: int
    out: str
    err: str


class Command:
    """Calls a command's `main` in this process, which saves the seconds of importing everything again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, name: str, *argv: object) -> Ended:
        import utils

        module, code = __import__(name), 0
        self.capsys.readouterr()
        self.monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
        try:
            utils.run_command(module.main)
        except SystemExit as end:
            code = end.code
        finally:
            close_logs()
        return Ended(code, *self.capsys.readouterr())


class HostWaits(TorchDispatchMode):
    """Counts, while entered, what makes the host wait for a GPU: values and shapes that it asks for, copies.

    Work on the CPU is counted as if its tensors were on a GPU; there `tolist` and `cpu` have no operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> "HostWaits":
        for name in ("tolist", "cpu", "numpy"):
            self.patch.setattr(Tensor, name, self.counted(name, getattr(Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patch.undo()

    def counted(self, name: str, method: Any) -> Any:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.counts[name] += 1
            return method(tensor, *args, **kwargs)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self.counts[name] += 1
        if name in ("index", "index_put", "index_put_"):
            self.counts["nonzero"] += any(
                index is not None and index.dtype == torch.bool for index in args[1]
            )
        to_host = name == "_to_copy" and str(kwargs.get("device")) == "cpu" and args[0].device.type != "cpu"
        self.counts["copy"] += to_host and not kwargs.get("non_blocking")
        return func(*args, **kwargs)

    @property
    def total(self) -> int:
        return self.counts.total()


class FakeCuda(FakeTensorMode):
    """Takes the place of a GPU: tensors on "cuda" have shape, type and device, and no values.

    What lies on the CPU is real. An operator on both raises, single numbers and copies apart. Copies to the
    CPU arrive as 0, 1, 0, 1 ...; half of a tensor is not zero; every `tolist` gives unequal numbers that are
    lower than those before. Each of these is a wait of the host for the device, and counted, unless it is a
    copy that does not block.

    Attributes:
        waits: what the host waited for, by name.
    """

    COPIES = ("aten::_to_copy", "aten::copy_")

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.waits, self.lists = Counter(), 0
        mode = self

        class Event:
            def __init__(self, **flags: bool):
                pass

            def record(self, stream: object = None) -> None:
                pass

            def synchronize(self) -> None:
                mode.waits["event"] += 1

        def tolist(tensor: FakeTensor) -> list[int]:
            mode.waits["tolist"] += 1
            mode.lists += 1
            return [max(0, 195 - 2 * mode.lists - 60 * i) for i in range(len(tensor))]

        def backward(loss: Tensor) -> None:
            assert loss.is_cuda and not loss.shape and loss.requires_grad

        for target, name, value in (
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda: True),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.cuda, "Event", Event),
            (Tensor, "pin_memory", lambda tensor: tensor),
            (FakeTensor, "tolist", tolist),
            (Tensor, "backward", backward),  # the engine of autograd asks for the device's context
        ):
            monkeypatch.setattr(target, name, value)

    def move(self, model: nn.Module, memory_format: torch.memory_format) -> None:
        """Move parameters and buffers, as `Module.to` does."""
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, value in table.items():
                    if value is not None and not value.is_cuda:
                        form = memory_format if value.ndim == 4 else torch.contiguous_format
                        moved = torch.empty(value.shape, dtype=value.dtype, device="cuda", memory_format=form)
                        is_parameter = isinstance(value, nn.Parameter)
                        table[name] = nn.Parameter(moved, value.requires_grad) if is_parameter else moved

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        on_cuda = [tensor for tensor in tensors if tensor.is_cuda]
        to = torch.device(kwargs.get("device") or "cpu")
        if to.type != "cuda" and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        name = func.name().split(".")[0]
        if name not in self.COPIES and any(t.ndim and not t.is_cuda for t in tensors) and on_cuda:
            raise AssertionError(f"{name} is called with tensors on the CPU and on CUDA")
        first = args[0] if args else None
        if name == "aten::_local_scalar_dense":
            self.waits["item"] += 1
            return {torch.bool: False}.get(first.dtype, 1.0 if first.is_floating_point() else 1)
        if name == "aten::nonzero":
            self.waits["nonzero"] += 1
            with self:
                return torch.empty((first.numel() + 1) // 2, first.ndim, dtype=torch.int64, device="cuda")
        moves_to = kwargs.get("device") if name == "aten::_to_copy" else None
        if moves_to is not None and not kwargs.get("non_blocking") and (to.type == "cpu" or not on_cuda):
            self.waits[f"to_{to.type}"] += 1
        if moves_to is not None and to.type == "cpu":
            dtype = kwargs.get("dtype") or first.dtype
            return torch.arange(first.numel()).remainder(2).to(dtype).view(first.shape)
        if not all(isinstance(tensor, FakeTensor) for tensor in tensors):
            args, kwargs = tree_map_only(Tensor, self.as_fake, (args, kwargs))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def as_fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.from_tensor(tensor)
