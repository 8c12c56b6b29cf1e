"""Tests of models/weights.py: weights from elsewhere start a model or are refused; what was taken is said."""

import logging
from pathlib import Path

import pytest
import timm
import torch
from cases import Command, unset
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import VisionTransformer

import main_deit
import models  # noqa: F401  (registers the models)
import utils
from checkpointing.format import chosen_weights, load_checkpoint, save_checkpoint
from inference.session import open_model
from models.weights import create_model, inherited_kwargs, initialise_from, model_from_checkpoint

SIZES = dict(embed_dim=16, depth=2, num_heads=2, patch_size=4, num_classes=5)
PLAIN = SIZES | dict(img_size=28)  # a grid of 7 x 7


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger=utils.log.name)
    return caplog


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """A model in evaluation mode whose parameters are all drawn, those that start as constants too."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def vit(**kwargs) -> VisionTransformer:
    """A small model of timm, whose blocks are ours."""
    return randomised(VisionTransformer(**(PLAIN | kwargs)))


# What timm's models hold that ours do not


@pytest.mark.parametrize("real", [pytest.param(True, marks=pytest.mark.slow), False])
def test_layer_scale_and_positions_without_a_class_entry_keep_the_function(real: bool) -> None:
    sizes = dict(img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6, num_classes=1000)
    theirs = vit(no_embed_class=True, init_values=0.1)
    if real:
        theirs = randomised(timm.create_model("deit3_small_patch16_224"))
    model = create_model("deit_nano", sizes if real else PLAIN).eval()
    initialise_from(model, theirs.state_dict(), "deit3.pth")
    assert not model.pos_embed[:, 0].any()
    images = torch.randn(2, 3, model.img_size, model.img_size)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[0].logits, theirs(images), atol=1e-4, rtol=1e-4)


def test_registers_are_named_and_their_positions_are_no_patches(logged: pytest.LogCaptureFixture) -> None:
    state = vit(reg_tokens=4).state_dict()  # a table of 1 + 4 + 49
    model = create_model("lf_deit_nano", SIZES | dict(location_stage_size=7, patch_size=4))
    initialise_from(model, state, "registers.pth")
    table = state["pos_embed"]
    torch.testing.assert_close(model.pos_embed_list[0], torch.cat([table[:, :1], table[:, 5:]], dim=1))
    assert any(text.startswith("not used: reg_token") for text in logged.messages)


@pytest.mark.parametrize("n", [1 + 6 * 8, 1 + 5 * 8, 49 + 3])
def test_a_table_that_is_no_square_grid_is_read_as_one_only_where_it_is_said(
    n: int, logged: pytest.LogCaptureFixture
) -> None:
    state = vit().state_dict() | {"pos_embed": torch.randn(1, n, 16)}
    model = create_model("lf_deit_nano", SIZES)
    initialise_from(model, state, "odd.pth")
    texts = "\n".join(logged.messages)
    assert ("no entry for the class token" in texts) == (n == 49)  # 7 x 7 without a class token
    assert ("not used: pos_embed" in texts) == (n != 49)


def test_kernels_of_another_patch_size_and_grids_are_resampled() -> None:
    state = vit(patch_size=7).state_dict()  # a grid of 4 x 4
    model = create_model("evit_deit_nano", PLAIN | dict(drop_loc=[1]))
    initialise_from(model, state, "coarse.pth")
    kernel = resample_patch_embed(state["patch_embed.proj.weight"], [4, 4])
    torch.testing.assert_close(model.patch_embed.proj.weight.data, kernel)
    table = resample_abs_pos_embed(state["pos_embed"], [7, 7], antialias=False)
    torch.testing.assert_close(model.pos_embed.data, table)


@pytest.mark.parametrize("name", ["evit_deit_small_distilled", "lf_deit_nano"])
def test_a_stray_distillation_token_takes_no_patch(name: str) -> None:
    state = vit().state_dict() | {"dist_token": torch.randn(1, 1, 16)}
    kwargs = SIZES if name.startswith("lf") else PLAIN | dict(drop_loc=[1])
    model = create_model(name, kwargs)
    initialise_from(model, state, "stray.pth")
    table = model.pos_embed_list[0] if name.startswith("lf") else model.pos_embed
    ours = table.shape[1] - 49
    assert torch.equal(table[:, ours:], state["pos_embed"][:, 1:])
    assert all(torch.equal(table[:, i], state["pos_embed"][:, 0]) for i in range(ours))


def test_other_sizes_inside_a_cascade_are_no_traceback() -> None:
    model = create_model("dvt_deit_nano", dict(embed_dim=64, depth=2, num_heads=2, num_classes=5))
    start = vit(embed_dim=64, mlp_ratio=2.0).state_dict()
    with pytest.raises(utils.InputError, match="another model or size"):
        initialise_from(model, start, "narrow.pth")


STRANGE = ["vit_medium_patch16_reg4_gap_256", "vit_relpos_small_patch16_224", "beit_base_patch16_224"]
STRANGE += ["swin_tiny_patch4_window7_224", "cait_xxs24_224", "vit_tiny_patch16_224", "resnet18"]
FITTING = ["vit_small_patch14_reg4_dinov2", "deit_small_distilled_patch16_224", "vit_small_patch32_224"]
FITTING += ["vit_small_patch16_384", "deit3_small_patch16_224"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lf_deit_small", "evit_deit_small_distilled", "dvt_deit_small"])
def test_real_models_of_timm_start_ours_or_are_refused(name: str) -> None:
    model = unset(name)
    for source in FITTING:
        initialise_from(model, unset(source).state_dict(), source)
    for source in STRANGE:
        state = unset(source).state_dict()
        try:
            initialise_from(model, state, source)
        except utils.InputError as error:
            assert "\n" not in str(error)
        else:
            assert source == "vit_relpos_small_patch16_224"  # its blocks are ours but for the positions


@pytest.mark.parametrize("kwargs", [dict(embed_dim=24, num_heads=3), dict(mlp_ratio=1.0)])
def test_weights_of_another_size_are_refused_and_nothing_is_loaded(kwargs: dict) -> None:
    model = create_model("deit_nano", PLAIN)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(utils.InputError, match=r"other.pth fits \d+ % of the model's parameters"):
        initialise_from(model, vit(**kwargs).state_dict(), "other.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_head_of_many_classes_does_not_count() -> None:
    model = create_model("deit_nano", PLAIN | dict(num_classes=2000))  # its head is most of its parameters
    initialise_from(model, vit().state_dict(), "few_classes.pth")


# Wrappers


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "encoder.", "model.backbone.", "module.model."])
@pytest.mark.parametrize("name", ["deit_nano", "dvt_deit_nano"])
def test_names_behind_a_wrapper_are_read(name: str, prefix: str) -> None:
    kwargs = PLAIN if name == "deit_nano" else SIZES | dict(embed_dim=32)
    state = randomised(create_model(name, kwargs)).state_dict()
    wrapped = {prefix + key: value for key, value in state.items()}
    model, *_ = model_from_checkpoint({"model": wrapped}, "lightning.ckpt", name, kwargs)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    other = create_model(name, kwargs)
    initialise_from(other, wrapped | {"criterion.weight": torch.ones(3)}, "lightning.ckpt")
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


def test_a_wrapped_plain_model_starts_every_exit() -> None:
    sizes = dict(embed_dim=64, depth=2, num_heads=2, num_classes=5)
    state = vit(img_size=56, **sizes).state_dict()
    model = create_model("dvt_deit_nano", sizes)
    initialise_from(model, {f"backbone.{key}": value for key, value in state.items()}, "wrapped.pth")
    for part in model.children():
        assert torch.equal(part.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])


# Which of two sets of weights


@pytest.mark.parametrize(
    ("keys", "best", "use_ema", "taken"),
    [
        ("model", None, None, "model"),
        ("model model_ema", None, None, "model"),
        ("model model_ema", "model_ema", None, "model_ema"),
        ("model model_ema", "model_ema", False, "model"),
        ("model model_ema", "model", True, "model_ema"),
        ("model_ema", None, None, "model_ema"),
        ("model_ema", None, True, "model_ema"),
        ("model_ema", None, False, "holds no raw weights .model.; take the averaged ones, with --use-ema"),
        ("model", None, True, "holds no averaged weights .model_ema.; leave --use-ema out"),
        ("model", "model_ema", None, "holds no averaged weights"),
        ("model", "optimizer", None, "best_weights is 'optimizer'"),
    ],
)
def test_the_weights_that_were_chosen_are_taken(
    keys: str, best: str | None, use_ema: bool | None, taken: str
) -> None:
    checkpoint: dict = {key: {"key": key} for key in keys.split()} | ({"best_weights": best} if best else {})
    if "weights" in taken:
        with pytest.raises(utils.InputError, match=taken):
            chosen_weights(checkpoint, use_ema, "file.pth")
    else:
        assert chosen_weights(checkpoint, use_ema, "file.pth") == taken


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema"])
def test_a_file_of_averaged_weights_alone_is_opened_and_started_from(key: str, tmp_path: Path) -> None:
    state = randomised(create_model("deit_nano", PLAIN)).state_dict()
    torch.save({key: {f"module.{name}": value for name, value in state.items()}}, tmp_path / "ema.pth")
    trained = open_model(load_checkpoint(tmp_path / "ema.pth"), "ema.pth", "deit_nano", PLAIN, use_ema=True)
    assert trained.weights == "model_ema"
    assert torch.equal(trained.model.head.weight, state["head.weight"])
    argv = ["--model", "deit_nano", "--finetune", str(tmp_path / "ema.pth"), "--data-path", "unused"]
    args, checkpoint = main_deit.parse(argv)
    model, *_ = main_deit.build_model(checkpoint, args.finetune, args.model, PLAIN)
    assert torch.equal(model.head.weight, state["head.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--eval-ema", "--no-eval-ema"])
def test_training_records_which_weights_its_best_epoch_was_chosen_by(
    flag: str, folder: Path, command: Command, tmp_path: Path
) -> None:
    argv = [
        "--model",
        "deit_nano",
        "--data-path",
        folder,
        "--epochs",
        1,
        "--batch-size",
        32,
        "--num_workers",
        0,
    ]
    ended = command("main_deit", *argv, "--device", "cpu", flag, "--output_dir", tmp_path)
    assert ended.code == 0, ended.err
    checkpoint, key = load_checkpoint(tmp_path / "model_best.pth"), "model_ema" if "--e" in flag else "model"
    assert checkpoint["best_weights"] == key
    trained = open_model(checkpoint, "best.pth")
    assert trained.weights == key
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, checkpoint[key][name])
    # The other commands take and name them, training goes on with those that it trains.
    ended = command("dynamic_inference", "--checkpoint_path", tmp_path / "model_best.pth", "--images", folder)
    assert ended.code == 0 and f"weights ({key})" in ended.err
    for use_ema, wanted in ((False, "model"), (None, key)):
        model, *_ = main_deit.build_model(checkpoint, "best.pth", None, {}, use_ema)
        assert torch.equal(model.head.weight, checkpoint[wanted]["head.weight"])


# What else a file brings along


def own_file(path: Path, name: str = "avit_deit_nano", **kwargs) -> dict:
    """A checkpoint of this project with settings of its own."""
    config = dict(mean=[0.1, 0.2, 0.3], std=[0.5, 0.5, 0.5], crop_pct=0.7, interpolation="bilinear")
    kwargs = PLAIN | kwargs
    checkpoint = {"model": create_model(name, kwargs).state_dict(), "model_name": name, "data_config": config}
    save_checkpoint(checkpoint | {"model_kwargs": kwargs}, path)
    return checkpoint


def test_starting_from_an_own_checkpoint_takes_over_what_the_model_was(
    tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    own = own_file(tmp_path / "own.pth", gate_center=12.0, gate_scale=3.0)
    argv = ["--finetune", str(tmp_path / "own.pth"), "--data-path", "unused", "--gate-scale", "4"]
    args, checkpoint = main_deit.parse([*argv, "--crop-pct", "0.8"])
    assert checkpoint == {} and args.model == "avit_deit_nano"
    assert (args.mean, args.std) == (own["data_config"]["mean"], own["data_config"]["std"])
    assert (args.crop_pct, args.interpolation) == (0.8, "bilinear")
    kwargs = main_deit.model_kwargs(args, 9)
    model, _, kwargs = main_deit.build_model(checkpoint, args.finetune, args.model, kwargs)
    assert (model.gate_center, model.gate_scale, model.num_classes) == (12.0, 4.0, 9)
    assert kwargs["gate_center"] == 12.0 and kwargs["embed_dim"] == 16
    assert torch.equal(model.cls_token, own["model"]["cls_token"])
    assert any("gate_center 12.0" in text and "own.pth" in text for text in logged.messages)


def test_another_method_takes_over_no_arguments(logged: pytest.LogCaptureFixture) -> None:
    start = {"model_name": "lf_deit_nano", "model_kwargs": {"alpha": 0.3}}
    assert inherited_kwargs("cf_deit_nano", start, "own.pth") == {}
    assert "its arguments are not taken over for cf_deit_nano" in logged.messages[-1]
    start["model_kwargs"] |= {"select_from_epoch": 9, "num_classes": 3}  # of that run, and of its data
    assert inherited_kwargs("lf_deit_small", start, "own.pth") == {"alpha": 0.3}


def test_a_foreign_checkpoint_is_evaluated_as_it_was_trained(
    folder: Path, command: Command, tmp_path: Path
) -> None:
    own = own_file(tmp_path / "own.pth", "deit_nano")
    torch.save(own["model"], tmp_path / "foreign.pth")
    foreign = ["--model", "deit_nano", "--model-kwargs", *(f"{key}={value}" for key, value in PLAIN.items())]
    given = "--mean 0.1 0.2 0.3 --std 0.5 0.5 0.5 --crop-pct 0.7 --interpolation bilinear".split()
    argv = ["--images", folder / "val" / "amber", "--num_workers", 0, "--device", "cpu", "--checkpoint_path"]
    wanted = command("dynamic_inference", *argv, tmp_path / "own.pth")
    plain = command("dynamic_inference", *argv, tmp_path / "foreign.pth", *foreign)
    ended = command("dynamic_inference", *argv, tmp_path / "foreign.pth", *foreign, *given)
    assert ended.code == 0 and ended.out == wanted.out != plain.out
    assert "mean 0.1 0.2 0.3" in ended.err and "mean" not in plain.err


def test_results_say_of_which_images_they_are(tmp_path: Path) -> None:
    own_file(tmp_path / "own.pth")
    checkpoint = load_checkpoint(tmp_path / "own.pth")
    plain = open_model(checkpoint, "own.pth", config={"interpolation": "bilinear"})  # as it was trained
    assert "interpolation" not in plain.results_of("val") and "mean" not in plain.results_of("val")
    other = open_model(checkpoint, "own.pth", config={"crop_pct": 1.0})
    assert other.results_of("val") == plain.results_of("val") | {"crop_pct": 1.0}


def test_a_standard_deviation_of_zero_is_refused(command: Command, tmp_path: Path) -> None:
    for name, flag in (
        ("dynamic_inference", "--checkpoint_path"),
        ("visualize", "--resume"),
        ("main_deit", ""),
    ):
        argv = ([flag, tmp_path / "any.pth"] if flag else []) + ["--data-path", "unused", "--std", 0, 1, 1]
        ended = command(name, *argv)
        assert ended.code == 2 and "--std" in ended.err


# Constructor arguments


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("avit_deit_nano", {"stop_at_class_token": "no"}),
        ("avit_deit_nano", {"stop_at_class_token": 0}),
        ("evit_deit_nano", {"fuse_token": "False"}),
        ("evit_deit_nano", {"drop_loc": "1,2"}),
        ("evit_deit_nano", {"shrink_epochs": "3"}),
        ("dvt_deit_nano", {"feature_reuse": "maybe"}),
        ("lf_deit_nano", {"region_size": 2.5}),
        ("lf_deit_nano", {"alpha": "0.5"}),
        ("cf_lvvit_nano", {"mix_token": "off"}),
        ("deit_nano", {"qkv_bias": "yes"}),
        ("deit_nano", {"depth": True}),
        ("deit_nano", {"mlp_ratio": float("nan")}),
    ],
)
def test_an_argument_of_another_type_is_refused_by_name(name: str, kwargs: dict) -> None:
    (key,) = kwargs
    with pytest.raises(utils.InputError, match=key):
        create_model(name, kwargs)


@pytest.mark.parametrize("value, fused", [("False", False), ("true", True), (True, True), ("perhaps", None)])
def test_a_published_command_line_is_read_by_what_it_says(value: object, fused: bool | None) -> None:
    state = create_model("evit_deit_nano", PLAIN | dict(drop_loc=[1])).state_dict()
    stored = {"model": state, "args": {"fuse_token": value, "drop_loc": "(1,)"}}
    if fused is None:
        with pytest.raises(utils.InputError, match="fuse_token is 'perhaps'"):
            model_from_checkpoint(stored, "evit.pth", "evit_deit_nano", PLAIN)
    else:
        model, *_ = model_from_checkpoint(stored, "evit.pth", "evit_deit_nano", PLAIN)
        assert model.fuse_token is fused
    stored["args"] = {"drop_loc": "every"}
    with pytest.raises(utils.InputError, match="evit.pth: its argument drop_loc is 'every'"):
        model_from_checkpoint(stored, "evit.pth", "evit_deit_nano", PLAIN)


def test_arguments_of_every_allowed_type_are_taken() -> None:
    for drop_loc in (1, [1, 2], (1,), []):
        create_model("evit_deit_nano", {"drop_loc": drop_loc, "keep_rate": 1})
    create_model("lf_deit_nano", {"region_size": None})
    assert create_model("avit_deit_nano", {"stop_at_class_token": False}).stop_at_class_token is False


@pytest.mark.parametrize(
    ("name", "side", "flag"),
    [
        ("lf_deit_small", 224, "--location-stage-size"),
        ("cf_lvvit_nano", 56, "--coarse-stage-size"),
    ],
)
def test_the_own_size_is_accepted_and_another_names_its_flag(name: str, side: int, flag: str) -> None:
    assert create_model(name, {"img_size": side}).img_size == side
    with pytest.raises(utils.InputError, match=f"img_size is {side + 64}, but {flag} sets it"):
        create_model(name, {"img_size": side + 64})
