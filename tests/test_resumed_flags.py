"""Each flag of training, given on resuming, has its effect or is refused; a new flag must be listed here."""

import functools
import shutil
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import pytest
import torch
from cases import Command, Ended
from torch import Tensor

import main_deit
from checkpointing.format import load_checkpoint

# What is given, and what is given with and without it, where it has an effect only beside something else.
EFFECT: dict[str, tuple[str, str]] = {
    "alpha": ("--alpha 0.5", ""),
    "select_from": ("--select-from 0.25", ""),
    "coarse_only": ("--coarse-only 0.3", ""),
    "region_size": ("--region-size 4", ""),
    "model_kwargs": ("--model-kwargs norm_eps=1e-3", ""),
    "drop_path": ("--drop-path 0.3", ""),
    "device_normalize": ("--device-normalize", ""),
    "fast_decode": ("--fast-decode", ""),
    "max_bad_images": ("--max-bad-images 2", ""),
    "crop_pct": ("--crop-pct 0.5", ""),
    "interpolation": ("--interpolation nearest", ""),
    "mean": ("--mean 0.1 0.2 0.3", ""),
    "std": ("--std 0.1 0.2 0.3", ""),
    "no_aug": ("--no-aug", ""),
    "scale": ("--scale 0.5 1", ""),
    "ratio": ("--ratio 1 1", ""),
    "hflip": ("--hflip 0.1", ""),
    "vflip": ("--vflip 0.1", ""),
    "color_jitter": ("--color-jitter 0.1", "--aa none"),
    "aa": ("--aa none", ""),
    "train_interpolation": ("--train-interpolation nearest", ""),
    "reprob": ("--reprob 0.5", ""),
    "remode": ("--remode const", ""),
    "recount": ("--recount 2", ""),
    "repeated_aug": ("--no-repeated-aug", ""),
    "mixup": ("--mixup 0.3", ""),
    "cutmix": ("--cutmix 0.3", ""),
    "cutmix_minmax": ("--cutmix-minmax 0.2 0.4", ""),
    "mixup_prob": ("--mixup-prob 0.5", ""),
    "mixup_switch_prob": ("--mixup-switch-prob 0.1", ""),
    "mixup_mode": ("--mixup-mode elem", ""),
    "smoothing": ("--smoothing 0.3", ""),
    "batch_size": ("--batch-size 8", ""),
    "epochs": ("--epochs 4", ""),
    "accumulate": ("--accumulate 2", ""),
    "clip_grad": ("--clip-grad 1", ""),
    "opt_eps": ("--opt-eps 1e-3", ""),
    "opt_betas": ("--opt-betas 0.5 0.6", ""),
    "weight_decay": ("--weight-decay 0.3", ""),
    "lr": ("--lr 0.1", ""),
    "unscale_lr": ("--unscale-lr", ""),
    "sched": ("--sched tanh", ""),
    "sched_on_updates": ("--no-sched-on-updates", ""),
    "min_lr": ("--min-lr 1e-4", ""),
    "warmup_lr": ("--warmup-lr 1e-4", ""),
    "warmup_epochs": ("--warmup-epochs 1", ""),
    "cooldown_epochs": ("--cooldown-epochs 3", ""),
    "model_ema": ("--no-model-ema", ""),
    "model_ema_decay": ("--model-ema-decay 0.5", ""),
    "eval_ema": ("--eval-ema", ""),
    "eval_metric": ("--eval-metric top5_c", ""),
    "amp": ("--amp bf16", ""),
    "matmul_precision": ("--matmul-precision high", ""),
    "compile": ("--compile", ""),
    "channels_last": ("--channels-last", ""),
    "print_freq": ("--print-freq 3", ""),
    "save_freq": ("--save-freq 3", ""),
    "checkpoint_every": ("--checkpoint-every 3", ""),
    "keep_last": ("--keep-last 3", ""),
    "skip_nonfinite": ("--skip-nonfinite 3", ""),
    "deterministic": ("--deterministic", ""),
    "picture_freq": ("--picture-freq 3", ""),
    "reset_optimizer": ("--reset-optimizer", ""),
}
# What is given, and what the line says.
REFUSED: dict[str, tuple[str, str]] = {
    "model": ("--model deit_nano", "is a checkpoint of lf_deit_nano, not of deit_nano"),
    "img_size": ("--img-size 64", "img_size"),
    "location_stage_size": ("--location-stage-size 9", "does not fit the model"),
    "finetune": ("--finetune other.pth", "--finetune other.pth: the run of"),
    "seed": ("--seed 5", "--seed 5: the run of"),
    "opt": ("--opt lion", "--opt lion: the run of"),
    "momentum": ("--momentum 0.5", "--momentum: --opt adamw has no momentum"),
    "data_set": ("--data-set CIFAR10", "CIFAR10"),
}
OF_OTHERS = "gate_scale gate_center ponder_token_scale distr_prior_alpha coarse_stage_size keep_rate drop_loc"
OF_OTHERS = f"{OF_OTHERS} shrink_start_epoch shrink_epochs dense_weight r".split()  # their values are numbers
# Of a run on several processes, on CUDA, with token labels, or of another data set or method: tested there.
ELSEWHERE = {"dist_eval", "pin_mem", "token_label", "token_label_data", "inat_category"}
ELSEWHERE |= {"fuse_token", "falling"}
ELSEWHERE |= {"image_key", "label_key", "val_labels", "val_synsets"}


def test_every_flag_is_listed() -> None:
    flags = vars(main_deit.make_parser().parse_args([])).keys() - main_deit.OF_ONE_RUN
    assert not flags - EFFECT.keys() - REFUSED.keys() - set(OF_OTHERS) - ELSEWHERE


def describe(value: Any, seen: dict[int, Any]) -> Any:
    """What an object is made of as nested lists, but for long tensors and generators."""
    if isinstance(value, (str, int, float, bool, type(None), Enum, Path, torch.dtype, torch.memory_format)):
        return str(value)
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() < 10 and not value.requires_grad else list(value.shape)
    if isinstance(value, (type, FunctionType, BuiltinFunctionType)):
        return value.__qualname__
    if id(value) in seen:
        return "seen"
    seen[id(value)] = value  # kept, or another object could have its id
    if isinstance(value, functools.partial):
        return [describe(part, seen) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, MethodType):
        return [value.__func__.__qualname__, describe(value.__self__, seen)]
    if isinstance(value, dict):
        return [[describe(key, seen), describe(item, seen)] for key, item in value.items()]
    if isinstance(value, (list, tuple, set, range)):
        return [describe(item, seen) for item in value]
    return [type(value).__qualname__, describe(getattr(value, "__dict__", {}), seen)]


@pytest.fixture
def resume(
    command: Command, folder: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Ended, dict[str, Any]]]]:
    """Resumes a run with further flags up to its first epoch: how that ended, and what was built for it."""
    built: dict[str, Any] = {}
    names = ("run", "wrapped", "data", "objective", "precision", "picture_freq")
    monkeypatch.setattr(
        main_deit, "train_epochs", lambda *parts: built.update(zip(names, parts, strict=True))
    )

    def resume(*argv: object, checkpoint: Path = trained / "checkpoint.pth") -> tuple[Ended, dict[str, Any]]:
        built.clear()
        flags = "--device cpu --num_workers 0 --epochs 3".split()
        ended = command("main_deit", "--data-path", folder, "--resume", checkpoint, *flags, *argv)
        return ended, built

    yield resume
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_float32_matmul_precision("highest")


def account(built: dict[str, Any]) -> str:
    """All that was built, as text; the recorded command line apart."""
    built["run"].settings.constant["args"] = None
    everywhere = [torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()]
    return str([describe(built, {}), *everywhere])


@pytest.fixture(scope="module")
def accounts() -> dict[str, str]:
    """What is built without a flag, by what is given beside it."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("name", EFFECT)
def test_a_flag_has_its_effect(name: str, resume: Callable, accounts: dict[str, str]) -> None:
    flag, beside = EFFECT[name]
    if beside not in accounts:
        accounts[beside] = account(resume(*beside.split())[1])
        assert account(resume(*beside.split())[1]) == accounts[beside]  # or a difference shows nothing
    ended, built = resume(*beside.split(), *flag.split())
    assert ended.code == 0, ended.err
    given = getattr(main_deit.make_parser().parse_args(flag.split()), name)
    assert built["run"].settings.constant["args"][name] == given
    assert account(built) != accounts[beside]


@pytest.mark.parametrize("name", REFUSED)
def test_a_flag_is_refused(name: str, resume: Callable) -> None:
    flag, text = REFUSED[name]
    ended, built = resume(*flag.split())
    assert ended.code == 2 and text in ended.err and not built
    assert len(ended.err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_OTHERS)
def test_a_flag_of_another_method_is_refused(name: str, resume: Callable) -> None:
    ended, built = resume(f"--{name.replace('_', '-')}", 3)
    assert ended.code == 2 and not built and len(ended.err.splitlines()) == 1, ended.err


def test_options_of_the_optimizer(resume: Callable, trained: Path) -> None:
    """In every group; what does not decay still does not, and what was not given stays."""
    flags = "--weight-decay 0.3 --opt-betas 0.5 0.6 --opt-eps 1e-3".split()
    ended, built = resume(*flags)
    assert ended.code == 0, ended.err
    before = load_checkpoint(trained / "checkpoint.pth")["optimizer"]
    optimizer = built["run"].update.optimizer
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0.3]
    assert [group["weight_decay"] for group in before["param_groups"]] == [0, 0.05]
    for group in optimizer.param_groups:
        assert list(group["betas"]) == [0.5, 0.6] and group["eps"] == 1e-3
        assert group["initial_lr"] == 5e-4 * 32 / 512
    state = optimizer.state_dict()["state"]
    assert torch.equal(state[3]["exp_avg"], before["state"][3]["exp_avg"]) and state[3]["step"] == 4
    args = built["run"].settings.constant["args"]
    assert (args["weight_decay"], args["opt_betas"], args["opt_eps"]) == (0.3, [0.5, 0.6], 1e-3)
    assert args["batch_size"] == 32 and args["opt"] == "adamw"


def test_another_optimizer_starts_without_state(resume: Callable) -> None:
    ended, built = resume("--opt", "sgd")
    assert ended.code == 2 and "--reset-optimizer" in ended.err and "damaged" not in ended.err
    ended, built = resume("--opt", "sgd", "--reset-optimizer")
    assert ended.code == 0, ended.err
    run = built["run"]
    assert isinstance(run.update.optimizer, torch.optim.SGD) and not run.update.optimizer.state
    assert run.epoch == 2 and run.settings.constant["args"]["opt"] == "sgd"
    assert run.update.optimizer.param_groups[1]["weight_decay"] == 0.05


def test_arguments_of_the_constructor(resume: Callable) -> None:
    """A flag, and a pair of --model-kwargs of the same argument: the last that was given."""
    ended, built = resume("--model-kwargs", "alpha=0.5", "norm_eps=1e-3")
    assert built["run"].settings.constant["model_kwargs"]["alpha"] == 0.5
    for flags, text in (
        (["--model-kwargs", "alpha=0.5", "--alpha", "0.4"], "give one of them"),
        (["--model-kwargs", "init=deit"], "init=deit: the weights of"),
        (["--model-kwargs", "drop_path_rate=0.5"], "give it as --drop-path"),
        (["--model-kwargs", "num_classes=9"], "the data tell it"),
        (["--model-kwargs", "depth=3"], "is of another model"),
    ):
        ended, built = resume(*flags)
        assert ended.code == 2 and text in ended.err and not built


def test_pairs_of_the_run_stay() -> None:
    saved = {"model_kwargs": ["depth=2", "alpha=0.5"], "alpha": None, "region_size": 4}
    kept, given = main_deit.without_what_is_replaced(saved, {"alpha": 0.3})
    assert given == {"alpha": 0.3, "model_kwargs": ["depth=2"]} and "model_kwargs" not in kept
    kept, given = main_deit.without_what_is_replaced(saved, {"model_kwargs": ["region_size=5", "depth=3"]})
    assert given["model_kwargs"] == ["alpha=0.5", "region_size=5", "depth=3"] and "region_size" not in kept


def test_another_measure_of_the_best(resume: Callable, trained: Path) -> None:
    """A top-5 accuracy is not compared with the top-1 accuracies before."""
    ended, built = resume("--eval-metric", "top5_f")
    assert built["run"].best == -1 and "the best epochs before do not count" in ended.err
    assert resume()[1]["run"].best == load_checkpoint(trained / "checkpoint.pth")["best"]


def test_a_checkpoint_without_arguments(resume: Callable, trained: Path, tmp_path: Path) -> None:
    saved = load_checkpoint(trained / "checkpoint.pth")
    for key, text in (("args", "no state of a run of this command"), ("optimizer", "weights only")):
        torch.save({name: value for name, value in saved.items() if name != key}, tmp_path / "file.pth")
        ended, built = resume(checkpoint=tmp_path / "file.pth")
        assert ended.code == 2 and f"holds {text}; start from it with --finetune" in ended.err and not built


# Classes


def test_classes_are_those_of_the_checkpoint(
    command: Command, folder: Path, trained: Path, tmp_path: Path
) -> None:
    """An unknown folder is refused before anything is written; a class that is gone keeps its number."""
    data, output = tmp_path / "data", tmp_path / "output"
    shutil.copytree(folder, data)
    (data / "train" / "amber").rename(data / "train" / "zebra")
    flags = "--device cpu --num_workers 0 --epochs 2".split()
    argv = ["--data-path", data, "--output_dir", output, "--resume", trained / "checkpoint.pth", *flags]
    ended = command("main_deit", *argv)
    assert ended.code == 2 and "'zebra'" in ended.err and not output.exists()
    shutil.rmtree(data / "train" / "zebra")
    ended = command("main_deit", *argv, "--epochs", 3)
    assert ended.code == 0, ended.err
    saved = load_checkpoint(output / "checkpoint.pth")
    assert (
        saved["class_names"] == ["amber", "blue", "coral", "dusk"]
        and saved["model_kwargs"]["num_classes"] == 4
    )


def test_training_numbers_classes_as_evaluation_does(resume: Callable, folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    shutil.rmtree(data / "train" / "amber")
    ended, built = resume("--data-path", data)
    assert ended.code == 0, ended.err
    train = built["data"].readable.dataset
    assert {(Path(path).parent.name, number) for path, number in train.samples} == {
        ("blue", 1),
        ("coral", 2),
        ("dusk", 3),
    }
