"""EViT against the published code's outputs, brute force, and the plain ViT."""

import csv
import json
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import VECTORS, Command, call, load_case, published_shapes, unset
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.loss import SoftTargetCrossEntropy
from torch._dynamo.testing import CompileCounterWithBackend

import models  # noqa: F401  (registers the models)
from models.cost import exit_gflops
from models.selection import original_patches
from models.weights import initialise_from

CASES = ["keep05_nofuse", "keep07_fuse", "keep08_fuse", "keep10", "pos_interp_07_fuse"]
RUNTIME = "evit_runtime_keep06_base08_fuse_grad"
MASKS = ["evit_mask_fuse", "evit_mask_nofuse"]
ALIASES = {
    "deit_small_patch16_shrink_base": (0.7, 224),
    "deit_base_patch16_shrink_base": (0.7, 224),
    "deit_small_patch16_224_shrink_base": (0.7, 224),
    "deit_small_patch16_224_shrink": (0.7, 224),
    "deit_small_patch16_224_shrink05": (0.5, 224),
    "deit_small_patch16_272_shrink": (0.7, 272),
    "deit_small_patch16_288_shrink06": (0.6, 288),
    "deit_small_patch16_304_shrink05": (0.5, 304),
}


def build_case(stem: str):
    """A case's model with its weights in evaluation mode, its description, images and expected values."""
    meta, weights, image, tensors = load_case(stem)
    same = ["img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes"]
    kwargs = {key: meta["ctor"][key] for key in [*same, "base_keep_rate", "drop_loc", "fuse_token"]}
    model = timm.create_model("deit_small_patch16_shrink_base", **kwargs)
    model.load_state_dict(weights)
    return model.eval(), meta, image, {key: torch.from_numpy(value) for key, value in tensors.items()}


def tiny(**kwargs):
    torch.manual_seed(0)
    sizes = dict(img_size=12, patch_size=2, embed_dim=8, depth=4, num_heads=2, num_classes=5, init="fan_in")
    return timm.create_model("evit_deit_small", **(sizes | dict(drop_loc=(1, 2, 3)) | kwargs)).eval()


def pictures(side: int = 12, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def check_kept(info: dict, expected: dict) -> None:
    found = {f"output.{key}": value for key, value in info.items()}
    wanted = {key: value.long() for key, value in expected.items() if key.startswith("output.kept_")}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@torch.inference_mode()
@pytest.mark.parametrize("stem", [f"evit_{case}" for case in CASES] + MASKS)
def test_outputs_equal_the_published_codes(stem: str) -> None:
    model, _, image, expected = build_case(stem)
    (out,) = model(image)
    torch.testing.assert_close(out.logits, expected["output.logits"], atol=1e-4, rtol=0)
    check_kept(out.info, expected)


def test_run_time_rate_loss_and_gradients_equal_the_published_codes() -> None:
    model, meta, image, expected = build_case(RUNTIME)
    model.keep_rate = meta["runtime_keep_rate"]
    (out,) = model(image)
    torch.testing.assert_close(out.logits, expected["output.logits"], atol=1e-4, rtol=0)
    check_kept(out.info, expected)
    loss = sum(model.loss([out], expected["input.soft_target"], SoftTargetCrossEntropy()).values())
    torch.testing.assert_close(loss.detach()[None], expected["output.loss"], atol=0, rtol=1e-4)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for key, value in expected.items():
        kind, _, name = key.partition(".")
        if kind == "grad":
            limit = 2e-3 * value.abs().max().item()
            torch.testing.assert_close(gradients[name], value, atol=limit, rtol=0)
        elif kind == "gradnorm":
            torch.testing.assert_close(gradients[name].norm()[None], value, atol=0, rtol=2e-3)


@torch.inference_mode()
@pytest.mark.parametrize("stem", MASKS)
def test_kept_patches_are_traced_back_and_a_fused_token_is_no_patch(stem: str) -> None:
    model, meta, image, expected = build_case(stem)
    found = model.picture(model(image)[0].info).kept
    for block, patches in zip(meta["drop_layers"], found, strict=True):
        assert torch.equal(patches, expected[f"output.original_idx_{block}"].long())
        for row, visible in zip(patches, expected[f"output.visible_patches_{block}"], strict=True):
            assert sorted(row[row >= 0].tolist()) == visible.nonzero()[:, 0].tolist()


def test_rate_follows_the_published_schedule() -> None:
    for case in json.loads((VECTORS / "evit_schedule.json").read_text()):
        settings = {key: case[key] for key in ("shrink_start_epoch", "shrink_epochs", "base_keep_rate")}
        model = tiny(**settings)
        for epoch, step, _, rate in case["points_epoch_batch_globalstep_keeprate"]:
            model.set_epoch(epoch + step / case["iters_per_epoch"])
            assert model.keep_rate == pytest.approx(rate, abs=1e-9)
        model.set_epoch(math.inf)
        assert model.keep_rate == case["base_keep_rate"]


@pytest.mark.parametrize("name", ["evit_deit_small", "deit_small_patch16_shrink_base"])
def test_state_dict_has_the_published_names_and_shapes(name: str) -> None:
    own = {key: list(value.shape) for key, value in timm.create_model(name).state_dict().items()}
    assert own == published_shapes("deit_small_patch16_shrink_base")
    assert own == {
        key: list(v.shape) for key, v in timm.create_model("deit_small_patch16_224").state_dict().items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name, wanted", ALIASES.items())
def test_published_names_have_their_rates_and_sizes(name: str, wanted: tuple) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        assert (model.keep_rate, model.img_size) == wanted
        assert timm.create_model(name, base_keep_rate=0.4, drop_loc=2).kept_per_block[2] == math.ceil(
            0.4 * (wanted[1] // 16) ** 2
        )


@torch.inference_mode()
@pytest.mark.parametrize("distilled", [False, True])
def test_nothing_dropped_is_timms_deit(distilled: bool) -> None:
    sizes = dict(img_size=32, embed_dim=24, depth=3, num_heads=3, num_classes=7)
    name = "deit_small_distilled_patch16_224" if distilled else "deit_small_patch16_224"
    theirs = timm.create_model(name, **sizes).eval()
    kind = "evit_deit_small_distilled" if distilled else "evit_deit_small"
    ours = timm.create_model(kind, keep_rate=1.0, drop_loc=(1, 2), **sizes).eval()
    ours.load_state_dict(theirs.state_dict())
    images = pictures(32)
    torch.testing.assert_close(ours(images)[0].logits, theirs(images), atol=1e-5, rtol=0)
    reshaped = timm.create_model(kind, keep_rate=0.5, drop_loc=(1, 2), **sizes).eval()
    reshaped.load_state_dict(theirs.state_dict())
    reshaped.keep_rate = 1.0
    torch.testing.assert_close(reshaped(images)[0].logits, theirs(images), atol=1e-5, rtol=0)
    assert not (reshaped(images)[0].logits - ours(images)[0].logits).any()


def brute_force(model, images: torch.Tensor) -> torch.Tensor:
    """The paper's formulas on one image at a time, with whole attention maps and Python lists of tokens."""
    rows = []
    for image in images:
        x = model.embed(image[None])[0]
        prefix = model.num_prefix_tokens
        for i, block in enumerate(model.blocks):
            heads = block.attn.num_heads
            q, k, v = block.attn.qkv(block.norm1(x)).reshape(len(x), 3, heads, -1).unbind(1)
            attention = torch.einsum("ihd,jhd->hij", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
            x = x + block.attn.proj(torch.einsum("hij,jhd->ihd", attention, v).flatten(1))
            scores = attention.mean(0)[0, prefix:]
            kept = math.ceil(model.keep_rate * len(scores))
            if i in model.drop_loc and kept < len(scores):
                order = sorted(range(len(scores)), key=lambda j: -scores[j].item())
                parts = [x[:prefix]] + [x[prefix + j][None] for j in order[:kept]]
                if model.fuse_token:
                    parts.append(sum(scores[j] * x[prefix + j] for j in order[kept:])[None])
                x = torch.cat(parts)
            x = x + block.mlp(block.norm2(x))
        x = model.norm(x)
        logits = [model.head(x[0])] + ([model.head_dist(x[1])] if prefix == 2 else [])
        rows.append(torch.stack(logits).mean(0))
    return torch.stack(rows)


@torch.inference_mode()
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("rate", [0.3, 0.5, 0.72, 0.99, 1.0])
def test_logits_equal_brute_force_whatever_the_rate(rate: float, fuse: bool, distilled: bool) -> None:
    model = tiny(keep_rate=rate, fuse_token=fuse, distilled=distilled)
    images = pictures()
    found = model(images)[0].logits
    torch.testing.assert_close(found, brute_force(model, images), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1:2], model(images[1:2])[0].logits, atol=1e-6, rtol=0)  # alone


@torch.inference_mode()
@pytest.mark.parametrize("drop_loc", [0, (3,), (0, 1, 2, 3), "", (2, 0)])
@pytest.mark.parametrize("side", [4, 12, 20])
def test_every_block_may_drop_at_every_size(drop_loc, side: int) -> None:
    model = tiny(keep_rate=0.6, drop_loc=drop_loc or (), fuse_token=True)
    images = pictures(side)
    torch.testing.assert_close(model(images)[0].logits, brute_force(model, images), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_rate_set_later_acts_only_where_the_model_was_built_to_drop() -> None:
    images, dropping, plain = pictures(), tiny(keep_rate=0.8), tiny(keep_rate=1.0)
    dense = plain(images)[0].logits
    plain.keep_rate = 0.5
    assert not plain(images)[0].info and torch.equal(plain(images)[0].logits, dense)
    dropping.keep_rate = 0.5
    assert dropping(images)[0].info["kept_1"].shape[1] == 18
    dropping.keep_rate = 1.0
    torch.testing.assert_close(dropping(images)[0].logits, dense, atol=1e-6, rtol=0)


def test_kept_counts_use_the_raw_product() -> None:
    assert tiny(img_size=20, keep_rate=0.55).kept_per_block[1] == 56  # 0.55 * 100 is a little above 55


def test_a_fused_slot_that_is_kept_stays_no_patch() -> None:
    first, second, third = torch.tensor([[3, 0, 2]]), torch.tensor([[3, 1]]), torch.tensor([[0, 2]])
    found = [patches.tolist() for patches in original_patches([first, second, third], fused=True)]
    assert found == [[[3, 0, 2]], [[-1, 0]], [[-1, -1]]]


def test_scores_carry_gradient_into_the_fused_token_only() -> None:
    images = pictures()
    for fuse in (True, False):
        model = tiny(keep_rate=0.5, fuse_token=fuse, drop_loc=(3,)).train()
        x = torch.randn(2, 10, 8, requires_grad=True)
        scores = torch.rand(2, 9, requires_grad=True)
        model.reorganise(x, scores, 4)[0].sum().backward()
        assert (scores.grad is not None) == fuse
        model(images)[0].logits.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_distilled_training_gives_both_heads_and_evaluation_their_mean() -> None:
    model, images, target = tiny(distilled=True), pictures(), torch.tensor([0, 1, 2])
    (trained,) = model.train()(images)
    (tested,) = model.eval()(images)
    mean = (trained.logits + trained.info["dist_logits"]) / 2
    torch.testing.assert_close(tested.logits, mean, atol=1e-6, rtol=0)
    terms = model.loss([trained], target, F.cross_entropy)
    both = F.cross_entropy(trained.logits, target) + F.cross_entropy(trained.info["dist_logits"], target)
    torch.testing.assert_close(sum(terms.values()), both / 2)
    assert {"cls_token", "dist_token", "pos_embed"} == model.no_weight_decay()


@pytest.mark.parametrize("theirs, ours", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_deit_weights_start_any_variant_at_any_size(theirs: int, ours: int) -> None:
    """The position grid is resampled; a distillation token is left out, or made from the class token."""
    source = tiny(distilled=theirs == 2)
    model = tiny(distilled=ours == 2, img_size=16)
    initialise_from(model, source.state_dict(), "source")
    grid = source.pos_embed[:, theirs:].unflatten(1, (6, 6)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (8, 8), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.pos_embed[:, ours:], grid, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.pos_embed[:, :1], source.pos_embed[:, :1])
    if ours == 2:
        token = source.dist_token if theirs == 2 else source.cls_token
        torch.testing.assert_close(model.dist_token, token)
        torch.testing.assert_close(model.pos_embed[:, 1], source.pos_embed[:, theirs - 1])
    torch.testing.assert_close(model.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("rate", [1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
def test_gflops_are_the_published_codes(rate: float, fuse: bool) -> None:
    rows = json.loads((VECTORS / "evit_macs_reference.json").read_text())["rows"]
    (row,) = [r for r in rows if r["keep_rate"] == rate and r["fuse_token"] == fuse]
    model = unset("evit_deit_small", keep_rate=rate, fuse_token=fuse)
    assert exit_gflops(model) == pytest.approx([row["fvcore_0_1_5"]], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [False, True])
@torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True)
def test_a_moving_rate_compiles_three_graphs_and_no_more(fuse: bool) -> None:
    """Dense, dropping, dropping with symbolic sizes."""
    torch._dynamo.reset()
    kwargs = dict(fuse_token=fuse, keep_rate=0.5, shrink_start_epoch=1, shrink_epochs=4, drop_path_rate=0.1)
    kwargs |= dict(depth=3, drop_loc=(1, 2))
    model, eager, counter = tiny(**kwargs), tiny(**kwargs), CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter)
    graphs, rates = [], set()
    for step in range(30):
        for one in (model, eager):
            one.train().set_epoch(step / 5)
        model(pictures())[0].logits.sum().backward()
        graphs.append(counter.frame_count)
        rates.add(tuple(model.kept_per_block))
        if step % 10 == 9:
            model.eval(), eager.eval()
            torch.testing.assert_close(model.stage(0, pictures(), {}).logits, eager(pictures())[0].logits)
    assert len(rates) > 10 and graphs[-1] <= 3


@pytest.mark.parametrize(
    "kwargs, said",
    [
        (dict(keep_rate=0), "keep_rate is 0"),
        (dict(keep_rate=1.2), "keep_rate is 1.2"),
        (dict(drop_loc=(3, 4)), "drop_loc is"),
        (dict(drop_loc=(1, 1)), "drop_loc is"),
        (dict(drop_loc=-1), "drop_loc is"),
        (dict(drop_loc=("1",)), "drop_loc is"),
        (dict(shrink_epochs=-1), "shrink_epochs"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny(**kwargs)


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 3, 12, 14), (1, 3, 13, 13)])
def test_images_that_do_not_fit_are_refused(shape: tuple) -> None:
    with pytest.raises(ValueError, match="images are"):
        tiny()(torch.zeros(shape))


# The commands


@pytest.fixture(scope="module")
def evit(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of four epochs that drop from the second on and reach their rate at the fourth."""
    output = tmp_path_factory.mktemp("evit") / "output"
    flags = (
        "--model evit_deit_nano --fuse_token --drop_loc (1,3) --base_keep_rate 0.5 --epochs 4 --device cpu"
    )
    flags += " --shrink_start_epoch 1 --shrink_epochs 2 --batch-size 32 --print-freq 1 --num_workers 0"
    call("main_deit", *flags.split(), "--data-path", folder, "--output_dir", output)
    return output


@pytest.mark.slow
def test_training_moves_and_logs_the_rate_and_tests_at_the_last(evit: Path) -> None:
    entries = [json.loads(line) for line in (evit / "log.txt").read_text().splitlines()]
    # Two steps an epoch, the last at its middle: half a cosine over epochs 1 to 3.
    rates = [1, *((3 + math.cos(math.pi * at / 4)) / 4 for at in (1, 3)), 0.5]
    assert [entry["train_keep_rate"] for entry in entries] == pytest.approx(rates)
    board = EventAccumulator(str(evit / "tensorboard")).Reload()
    logged = [event.value for event in board.Scalars("step/keep_rate")]
    assert logged[0] == 1 and logged[-1] == 0.5 and logged == sorted(logged, reverse=True)
    assert "keep_rate 0.5" in (evit / "train.log").read_text()


@pytest.mark.slow
def test_a_checkpoint_brings_its_rate_to_inference(
    evit: Path, folder: Path, tmp_path: Path, command: Command
) -> None:
    from checkpointing.format import load_checkpoint
    from models.weights import model_from_checkpoint

    checkpoint = load_checkpoint(evit / "checkpoint.pth")
    model, *_ = model_from_checkpoint(checkpoint, "it", None, {})
    assert (model.keep_rate, sorted(model.drop_loc), model.fuse_token) == (0.5, [1, 3], True)
    infer = [
        "dynamic_inference",
        "--checkpoint_path",
        evit / "checkpoint.pth",
        "--num_workers",
        0,
        "--device",
        "cpu",
    ]
    report = tmp_path / "report.json"
    ended = command(
        *infer, "--data_url", folder, "--eval-mode", 1, "--results", report, "--base_keep_rate", 0.7
    )
    assert ended.code == 0, ended.err
    found = json.loads(report.read_text())
    model = timm.create_model(
        "evit_deit_nano", num_classes=4, keep_rate=0.7, drop_loc=(1, 3), fuse_token=True
    )
    assert found["flops"] == pytest.approx(exit_gflops(model))
    ended = command(*infer, "--images", folder / "val" / "amber")
    rows = list(csv.DictReader(ended.out.splitlines()))
    assert len(rows) == 10 and all(row["exit"] == "full" and row["region"] == "" for row in rows)


@pytest.mark.slow
def test_one_checkpoint_is_tried_at_several_rates(
    evit: Path, folder: Path, tmp_path: Path, command: Command
) -> None:
    infer = ["dynamic_inference", "--checkpoint_path", evit / "checkpoint.pth", "--data_url", folder]
    infer += ["--num_workers", 0, "--device", "cpu"]
    report = tmp_path / "report.json"
    ended = command(*infer, "--vary", "keep_rate", 0.3, 0.5, 1, "--results", report)
    assert ended.code == 0, ended.err
    found = json.loads(report.read_text())
    assert found["varied"] == {"keep_rate": [0.3, 0.5, 1.0]}
    for rate, cost, accuracy in zip([0.3, 0.5, 1], *found["budgeted_batch_classification"], strict=True):
        report.unlink(missing_ok=True)
        # The rate set later is the rate built in, but for 1, which then drops nothing.
        ended = command(*infer, "--eval-mode", 0, "--results", report, "--base_keep_rate", rate)
        alone = json.loads(report.read_text())
        assert alone["flops"] == [pytest.approx(cost)]
        assert alone["anytime_classification"] == [pytest.approx(accuracy)]
    for flags, said in (
        (["gate_center", 3], "it takes keep_rate"),
        (["keep_rate", "x"], "a name and numbers"),
    ):
        ended = command(*infer, "--vary", *flags)
        assert ended.code == 2 and said in ended.err
        assert ended.err.count("\n") == 1


@pytest.mark.slow
def test_pictures_show_what_stays_after_each_drop(
    evit: Path, folder: Path, tmp_path: Path, command: Command
) -> None:
    ended = command(
        "visualize", "--resume", evit / "checkpoint.pth", "--data-path", folder, "--output_dir", tmp_path,
        "--n_visualization", 3, "--device", "cpu",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    drawn = sorted(tmp_path.glob("label*.png"))
    assert len(drawn) == 3
    with Image.open(drawn[0]) as picture:
        assert picture.width == 3 * 224 + 2 * 4  # the input and two drops


@pytest.mark.slow
def test_finetuning_at_a_higher_resolution(
    evit: Path, folder: Path, tmp_path: Path, command: Command
) -> None:
    flags = ["--finetune", evit / "checkpoint.pth", "--input-size", 72, "--epochs", 1, "--batch-size", 32]
    flags += ["--data-path", folder, "--output_dir", tmp_path, "--num_workers", 0, "--device", "cpu"]
    ended = command("main_deit", "--model", "evit_deit_nano", *flags)
    assert ended.code == 0, ended.err
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert state["model"]["pos_embed"].shape == (1, 18 * 18 + 1, 64)
    assert state["model_kwargs"]["img_size"] == 72


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--drop_loc", "__import__('os')"], "is no list of block numbers"),
        (["--drop_loc", "3,9"], "drop_loc is [3, 9]: take different block numbers from 0 to 3"),
        (["--base_keep_rate", "0"], "keep_rate is 0.0: take a share in (0, 1]"),
        (["--input-size", "57"], "img_size 57 is not a multiple of patch_size 4"),
        (["--shrink_epochs", "-1"], "take 0 or more"),
    ],
)
def test_bad_flags_are_told_in_one_line(flags: list, said: str, folder: Path, command: Command) -> None:
    ended = command(
        "main_deit", "--model", "evit_deit_nano", "--data-path", folder, "--device", "cpu", *flags
    )
    assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1
