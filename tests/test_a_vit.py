"""A-ViT against the published code's values, and its two paths against each other."""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import Command, load_case, published_shapes, run
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import datasets
import models
from checkpointing.format import load_checkpoint
from models.a_vit import (
    AViT,
    attend_packed,
    attend_padded,
    halting_prior,
    prior_loss,
    read_file_name,
    varlen_attn,
)
from models.cost import stage_gflops, token_gflops
from models.vit import AdaptiveViT, StageOutput
from models.weights import model_from_checkpoint

STEMS = ["avit_gate10_30", "avit_gate5_8"]


def build_case(stem: str) -> tuple[AViT, dict, Tensor, dict[str, Tensor]]:
    """A case's model with its weights; its description, images and expected values."""
    meta, weights, image, tensors = load_case(stem)
    same = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes")
    same += ("gate_scale", "gate_center")
    scales = {name: meta[name] for name in ("ponder_token_scale", "distr_prior_alpha")}
    model = timm.create_model("avit_deit_tiny", **{key: meta["ctor"][key] for key in same}, **scales)
    model.load_state_dict(weights)
    return model, meta, image, {key: torch.from_numpy(value) for key, value in tensors.items()}


def spread(seed: int = 0, **kwargs) -> AViT:
    """A small model in evaluation mode whose tokens halt all over the depth, by position and brightness."""
    torch.manual_seed(seed)
    sizes = dict(img_size=32, patch_size=4, embed_dim=24, depth=6, num_heads=3, num_classes=5)
    model = timm.create_model("avit_deit_nano", **(sizes | dict(gate_scale=4.0, gate_center=8.0) | kwargs))
    with torch.no_grad():
        model.pos_embed.normal_()
        model.patch_embed.proj.weight[0].fill_(0.1)  # channel 0 of a patch is its brightness
        for block in model.blocks:
            block.mlp.fc2.bias[0] = 0.6
            for norm in (block.norm1, block.norm2):  # as of a trained model: a bias that is not zero
                norm.bias.normal_(std=0.5)
    return model.eval()


def pictures(batch: int, seed: int = 1, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator)


@contextmanager
def masking(model: AViT) -> Iterator[None]:
    """Takes the masked path in evaluation mode."""
    model.packed = model.masked
    try:
        yield
    finally:
        del model.packed


def masked(model: AViT, images: Tensor) -> StageOutput:
    with masking(model):
        return model(images)[0]


def assert_same(found: StageOutput, expected: StageOutput) -> None:
    for name in ("depth", "tokens"):
        assert torch.equal(found.info[name], expected.info[name])
    assert_close(found.info["rho"], expected.info["rho"], atol=1e-5, rtol=0)
    assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", ["masked", "packed"])
@pytest.mark.parametrize("stem", STEMS)
@torch.inference_mode()
def test_outputs_equal_the_published_codes(stem: str, path: str) -> None:
    model, meta, image, expected = build_case(stem)
    read: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    found = model.eval()(image)[0] if path == "packed" else masked(model.eval(), image)
    assert_close(found.logits, expected["output.logits"], atol=1e-5, rtol=0)
    assert_close(read[0], expected["output.accumulated_cls"], atol=2e-5, rtol=1e-5)
    assert torch.equal(found.info["depth"], expected["output.token_depth"].long())
    assert torch.equal(found.info["tokens"], expected["output.active_tokens_per_layer"].T.long())
    assert_close(found.info["rho"], expected["output.rho"], atol=1e-5, rtol=0)
    for name, value in meta["metrics_reference"].items():
        assert model.statistics([found])[name].item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("stem", STEMS)
def test_training_equals_the_published_codes(stem: str) -> None:
    """The published prior leaves the first sample out; the model's own includes it."""
    model, _, image, expected = build_case(stem)
    outputs = model.train()(image)
    terms = model.loss(outputs, expected["input.soft_target"], SoftTargetCrossEntropy())
    scores = outputs[0].info["scores"]
    assert_close(scores, expected["output.halting_score"].mean(dim=2).T, atol=1e-5, rtol=0)
    assert_close(scores[1:].mean(dim=0), expected["output.halting_score_layer"], atol=1e-5, rtol=0)
    assert_close(outputs[0].logits, expected["train.logits"], atol=2e-5, rtol=0)
    kl = prior_loss(scores[1:], model.prior)
    total = terms["ce"] + terms["ponder"] + model.distr_prior_alpha * kl
    found = {"base_ce": terms["ce"], "ponder_loss": terms["ponder"], "kl_unscaled": kl, "total": total}
    for name, value in found.items():
        assert_close(value[None], expected[f"train.loss.{name}"], rtol=1e-5, atol=0)
    assert_close(terms["prior"], model.distr_prior_alpha * prior_loss(scores, model.prior))
    total.backward()
    for name, parameter in model.named_parameters():
        if (value := expected.get(f"grad.{name}")) is not None:
            assert_close(parameter.grad, value, atol=1e-4 * value.abs().max().item(), rtol=0)
        if (norm := expected.get(f"gradnorm.{name}")) is not None:
            assert_close(parameter.grad.norm()[None], norm, rtol=1e-4, atol=0)


def test_prior_of_twelve_blocks_is_the_published_one() -> None:
    expected = torch.from_numpy(load_case(STEMS[0])[3]["train.distr_target"])
    assert_close(halting_prior(12), expected, rtol=1e-6, atol=0)
    assert halting_prior(12).argmax() == 8
    for depth in (1, 2, 4, 16, 60):
        assert halting_prior(depth).isfinite().all() and len(halting_prior(depth)) == depth


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_names_and_shapes_are_the_published_ones(size: str) -> None:
    name = f"avit_{size}_patch16_224"
    for alias in (name, f"avit_deit_{size}"):
        with torch.device("meta"):
            model = timm.create_model(alias)
        assert {k: list(v.shape) for k, v in model.state_dict().items()} == published_shapes(name)
        assert model.gate_center == {"tiny": 30, "small": 75}[size]


def test_a_gate_that_never_fires_leaves_the_plain_model() -> None:
    plain = timm.create_model("deit_nano").eval()
    model = timm.create_model("avit_deit_nano", gate_center=1000).eval()
    model.load_state_dict(plain.state_dict())
    images = pictures(2, size=56)
    with torch.no_grad():
        expected, found = plain(images)[0], model(images)[0]
    assert_close(found.logits, expected.logits, atol=1e-6, rtol=0)
    assert (found.info["depth"] == 4).all() and (found.info["rho"] == 5).all()


@pytest.mark.parametrize("seed", range(12))
@torch.inference_mode()
def test_packed_equals_masked(seed: int) -> None:
    """Depths 2 to 12, hard and soft gates, batches of 1 to 7, from hardly any halting to hardly any depth."""
    draw = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[torch.randint(len(values), (), generator=draw)]

    scale = pick(1.0, 4.0, 10.0)
    model = spread(seed, gate_scale=scale, gate_center=scale * pick(1.0, 2.0, 3.0), depth=pick(2, 5, 12))
    images = pictures(pick(1, 2, 7), seed) * pick(0.3, 1.0, 3.0)
    assert_same(model(images)[0], masked(model, images))


@torch.inference_mode()
def test_an_image_may_end_at_the_first_block_beside_one_that_never_halts() -> None:
    model = spread()
    level = torch.tensor([5.0, -9.0, 0.0, 9.0])[:, None, None, None]
    images = pictures(4) * (level == 0) + level
    with torch.no_grad():
        model.pos_embed[..., 0] = 0
        model.cls_token[..., 0] = 9  # and every class token halts at once
        depths = model(images)[0].info["depth"]
        assert depths[0].max() == 1 and depths[1, 1:].min() == 6 and depths[3].max() == 1
        assert len(depths[2].unique()) > 2
        assert_same(model(images)[0], masked(model, images))
        model.cls_token[..., 0] = -9
        assert_same(model(images)[0], masked(model, images))
        model.cls_token[..., 0] = 9
        all_gone = model(images[[0, 3]])[0]
    assert all_gone.info["tokens"].tolist() == 2 * [[65, 0, 0, 0, 0, 0]]
    assert_same(all_gone, masked(model, images[[0, 3]]))


@torch.inference_mode()
def test_tokens_are_conserved_and_never_come_back() -> None:
    model = spread()
    output = model(pictures(6))[0]
    depth, rho, tokens = (output.info[name] for name in ("depth", "rho", "tokens"))
    assert torch.equal(tokens.sum(dim=1), depth.sum(dim=1))
    assert (tokens.diff(dim=1) <= 0).all() and (tokens[:, 0] == depth.shape[1]).all()
    assert set(range(1, 7)) == set(depth.unique().tolist())
    assert ((rho > depth) & (rho <= depth + 1)).all()
    for block in range(6):  # tokens that enter block l are those of a depth above l
        assert torch.equal(tokens[:, block], (depth > block).sum(dim=1))


@torch.inference_mode()
def test_a_batch_of_one_is_a_row_of_the_batch() -> None:
    model, images = spread(), pictures(5)
    whole = model(images)[0]
    for row in range(5):
        expected = StageOutput(
            whole.logits[row : row + 1], {k: v[row : row + 1] for k, v in whole.info.items()}
        )
        assert_same(model(images[row : row + 1])[0], expected)


@torch.inference_mode()
def test_ending_with_the_class_token_keeps_the_logits() -> None:
    images, model = pictures(6), spread()
    expected = model(images)[0]
    model.stop_at_class_token = True
    found = model(images)[0]
    depth = expected.info["depth"]
    assert_close(found.logits, expected.logits, atol=1e-6, rtol=0)
    assert torch.equal(found.info["depth"], depth.minimum(depth[:, :1]))
    assert (found.info["tokens"].sum(dim=1) < expected.info["tokens"].sum(dim=1)).any()
    assert torch.equal(found.info["tokens"].sum(dim=1), found.info["depth"].sum(dim=1))


@pytest.mark.parametrize("autocast", [True, False])
@torch.inference_mode()
def test_bfloat16_stays_within_its_rounding(autocast: bool) -> None:
    model, images = spread(), pictures(4)
    exact = model(images)[0].logits
    if not autocast:
        model, images = model.bfloat16(), images.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, other = model(images)[0], masked(model, images)
    for output in (found, other):
        assert output.info["rho"].dtype == torch.float32
        assert (output.logits - exact).abs().max() < 0.05 * exact.abs().max()
    assert (found.info["depth"] != other.info["depth"]).float().mean() < 0.05


def bounds_of(lengths: list[int]) -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0))


@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [3, 0, 7, 1], [0, 0, 6], [1, 1, 2]])
def test_packed_attention_stays_inside_each_sequence(lengths: list[int]) -> None:
    q, k, v = torch.randn(3, sum(lengths), 2, 8, generator=torch.Generator().manual_seed(0))
    rows = []
    for qs, ks, vs in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        weights = (torch.einsum("ihd,jhd->hij", qs, ks) / 8**0.5).softmax(dim=-1)
        rows.append(torch.einsum("hij,jhd->ihd", weights, vs))
    bounds = bounds_of(lengths)
    for found in (attend_packed(q, k, v, bounds, lengths, 9), attend_padded(q, k, v, bounds, 9)):
        assert_close(found, torch.cat(rows), atol=1e-6, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_packed_equals_masked_on_cuda(dtype: torch.dtype) -> None:
    assert varlen_attn is not None or torch.__version__ < "2.10"
    lengths, rounding = [3, 0, 70, 1], 1e-5 if dtype == torch.float32 else 0.02
    qkv, bounds = torch.randn(3, sum(lengths), 2, 32, device="cuda", dtype=dtype), bounds_of(lengths)
    expected = attend_packed(*qkv.float().cpu(), bounds, lengths, 70)
    for longest in (70, 197):
        found = attend_packed(*qkv, bounds.to("cuda"), lengths, longest)
        assert_close(found.float().cpu(), expected, atol=rounding, rtol=0)
    model, images = (x.to("cuda", dtype) for x in (spread(embed_dim=48), pictures(5)))
    found, expected = model(images)[0], masked(model, images)
    assert (found.info["depth"] != expected.info["depth"]).float().mean() < 0.05
    assert_close(found.logits, expected.logits, atol=10 * rounding, rtol=0)


@pytest.mark.slow
def test_cost_at_full_depth_is_the_plain_models() -> None:
    for name, published in (("avit_deit_tiny", 1.254), ("avit_deit_small", 4.599)):
        model = timm.create_model(name)
        width, heads = model.embed_dim, model.blocks[0].attn.num_heads
        plain = stage_gflops(AdaptiveViT(embed_dim=width, num_heads=heads))
        full = token_gflops(model, torch.full((2, 12), 197))
        assert full.tolist() == pytest.approx(2 * plain, rel=1e-9)
        assert stage_gflops(model) == pytest.approx(plain, rel=1e-9)
        norms = 12 * 10 * 197 * width + 5 * width
        assert full[0].item() - norms / 1e9 == pytest.approx(published, abs=5e-4)


@torch.inference_mode()
def test_cost_is_what_runs() -> None:
    """PyTorch's counter sees linear layers, convolutions and attention, at two per multiply-add."""
    model, images = spread(), pictures(5)
    with FlopCounterMode(display=False) as counter:
        tokens = model(images)[0].info["tokens"]
    assert tokens[:, -1].min() < 20
    norms = 5 * model.embed_dim * (2 * tokens.sum() + len(images))
    expected = 2e9 * token_gflops(model, tokens).sum() - 2 * norms
    assert counter.get_total_flops() == pytest.approx(expected.item(), rel=1e-9)
    closed = 64 * 48 * 24 + (12 * tokens * 24**2 + 2 * tokens**2 * 24).sum(dim=1) + 24 * 5
    assert 2 * closed.sum().item() == counter.get_total_flops()


def terms_of(model: AViT, batch: int = 3) -> dict[str, Tensor]:
    outputs = model.train()(pictures(batch))
    return model.loss(outputs, torch.arange(batch) % 5, F.cross_entropy)


def test_loss_is_finite_for_one_image_and_for_gates_that_are_shut() -> None:
    for model in (spread(), spread(gate_scale=10, gate_center=75.0), spread(gate_scale=10, gate_center=1e4)):
        model.zero_grad()
        terms = terms_of(model, 1)
        assert set(terms) == {"ce", "ponder", "prior"}
        sum(terms.values()).backward()
        assert all(value.isfinite() for value in terms.values())
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert set(terms_of(spread(distr_prior_alpha=0.0))) == {"ce", "ponder"}
    assert set(model.loss(model.eval()(pictures(1)), torch.tensor([0]), F.cross_entropy)) == {"ce", "ponder"}


def reached(model: AViT, name: str) -> list[bool]:
    """Blocks that a gradient of the named loss term flows into."""
    model.zero_grad()
    terms_of(model)[name].backward()
    grads = [[p.grad for p in block.parameters() if p.grad is not None] for block in model.blocks]
    return [any(grad.abs().sum() > 0 for grad in found) for found in grads]


def test_gradients_reach_what_the_terms_depend_on() -> None:
    """The ponder cost depends on the scores before the one that halts, the prior on those of every block."""
    model = spread(gate_center=20.0)
    assert reached(model, "ponder") == [True] * 5 + [False]
    assert model.head.weight.grad is None and model.norm.weight.grad is None
    model = spread()
    assert reached(model, "prior") == [True] * 6
    with torch.no_grad():
        model.cls_token[..., 0] = -9  # the class token sees all blocks
    assert reached(model, "ce") == [True] * 6
    with torch.no_grad():
        model.cls_token[..., 0] = 30  # the class token halts at the first block and is all that is classified
    assert reached(model, "ce") == [True] + [False] * 5
    with torch.no_grad():
        model.pos_embed[..., 0] = 30  # all tokens do: the ponder cost is 2 whatever the weights are
    assert reached(model, "ponder") == [False] * 6
    assert model.train()(pictures(3))[0].info["rho"].eq(2).all()


def test_halted_tokens_pass_the_priors_gradient_back() -> None:
    """They are zero in value only: their scores at block 2 depend on what block 0 did to them."""
    model = spread(gate_scale=0.05, gate_center=0.0)
    with torch.no_grad():
        model.cls_token[..., 0] = 1e3
        model.pos_embed[..., 0] = 1e3
    info = model.train()(pictures(2))[0].info
    assert (info["depth"] == 1).all()
    info["scores"][:, 2].sum().backward()
    assert model.blocks[0].mlp.fc2.bias.grad[0] > 0
    assert model.blocks[0].mlp.fc2.bias.grad[1:].abs().max() == 0  # block 1 read zeros: no other way back


def test_a_token_at_the_threshold_halts() -> None:
    model, x = spread(), torch.full((2, 24), -1e9)  # scores of 0
    total = torch.tensor([0.99, 0.99])
    total[1] = total[1].nextafter(torch.tensor(0.0))
    assert model.halt(0, x, total)[2].tolist() == [True, False]
    assert model.halt(5, x, total)[2].tolist() == [True, True]


def test_training_with_stochastic_depth_learns_everywhere() -> None:
    model = spread(drop_path_rate=0.2)
    sum(terms_of(model, 4).values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(training: bool) -> None:
    model, images = spread().train(training), pictures(3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_same(compiled(images)[0], model(images)[0])


@pytest.mark.parametrize(
    "name, gates",
    [
        ("weights/small-10-75.pth", (10, 75)),
        ("tiny-10-30.pth", (10, 30)),
        ("avit-tiny-2.5-7.25.pth", (2.5, 7.25)),
        ("weights/visualization-tiny.pth", (5, 50)),
        ("checkpoint.pth", None),
        ("model_best.pth", None),
        ("run-3.pth", None),
        ("avit-2024-05-11.pth", None),
        ("10-30.pth", None),
        ("small-10-75/checkpoint.pth", None),
    ],
)
def test_gates_come_from_published_names_only(name: str, gates: tuple | None) -> None:
    expected = {} if gates is None else {"gate_scale": gates[0], "gate_center": gates[1]}
    assert read_file_name(Path(name)).get("model_kwargs", {}) == expected


def test_wrong_input_says_so() -> None:
    with pytest.raises(ValueError, match="expected"):
        spread()(pictures(1, size=36))
    for name in ("gate_scale", "gate_center", "ponder_token_scale"):
        with pytest.raises(ValueError, match=name):
            timm.create_model("avit_deit_nano", **{name: -1.0})
    assert models.recipe_of("avit_small_patch16_224") == {"epochs": 100, "batch_size": 96, "lr": 3e-4}


@pytest.fixture(scope="module")
def halting(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of an epoch from a published-looking file of DeiT-like weights. Not to be written to."""
    root = tmp_path_factory.mktemp("a_vit")
    torch.manual_seed(0)
    model = timm.create_model("avit_deit_nano", num_classes=4, patch_size=8)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc2.bias[0] += 0.5  # scores grow from block to block
    torch.save({"model": model.state_dict()}, root / "nano-8-4.5.pth")
    flags = ["--model", "avit_deit_nano", "--model-kwargs", "patch_size=8"]
    flags += ["--finetune", root / "nano-8-4.5.pth"]
    flags += ["--epochs", 1, "--batch-size", 32, "--gate-center", 4, "--ponder_token_scale", 0.01]
    flags += ["--data-path", folder, "--output_dir", root / "out", "--num_workers", 0, "--device", "cpu"]
    ended = run("main_deit.py", *flags)
    assert ended.returncode == 0, ended.stderr
    return root / "out"


@pytest.mark.slow
def test_gates_travel_with_the_checkpoint_and_flags_win(halting: Path) -> None:
    kwargs = load_checkpoint(halting / "checkpoint.pth")["model_kwargs"]
    gates = {name: kwargs[name] for name in ("gate_scale", "gate_center", "ponder_token_scale")}
    assert gates == {"gate_scale": 8, "gate_center": 4, "ponder_token_scale": 0.01}


@pytest.mark.slow
def test_training_logs_what_halts(halting: Path) -> None:
    (line,) = (json.loads(line) for line in (halting / "log.txt").read_text().splitlines())
    for part in ("train", "test"):
        live = [line[f"{part}_live_tokens_{i}"] for i in range(4)]
        assert live[0] == 50 and live == sorted(live, reverse=True) and 0 < live[3] < 50
        assert line[f"{part}_cnt_token_mean"] == pytest.approx(sum(live) / 50, rel=1e-5)
        assert line[f"{part}_expected_depth_ratio"] == pytest.approx(sum(live) / 200, rel=1e-5)
    # The tested weights: each image's depth is remade here, one by one.
    checkpoint = load_checkpoint(halting / "checkpoint.pth")
    model, *_ = model_from_checkpoint(checkpoint, "the checkpoint", None, {})
    transform = datasets.eval_transform(56, checkpoint["data_config"])
    data = datasets.build_dataset(
        datasets.DataSource("IMNET", checkpoint["args"]["data_path"]), "val", transform
    )
    with torch.inference_mode():
        infos = [model.eval()(image[None])[0].info for image, _ in data]
    depths = torch.cat([info["depth"] for info in infos]).double()
    cost = torch.cat([token_gflops(model, info["tokens"]) for info in infos]).mean()
    assert line["test_cnt_token_mean"] == pytest.approx(depths.mean().item(), abs=1e-3)
    assert line["test_gflops"] == pytest.approx(cost.item(), rel=1e-3)
    assert line["train_ponder"] == pytest.approx(0.01 * (line["train_cnt_token_mean"] + 0.5), abs=0.01)


@pytest.mark.slow
def test_cost_is_told_per_image_and_the_gate_gives_a_curve(
    halting: Path, folder: Path, tmp_path: Path, command: Command
) -> None:
    infer = ["dynamic_inference", "--checkpoint_path", halting / "checkpoint.pth", "--data_url", folder]
    infer += ["--num_workers", 0, "--device", "cpu"]
    report = tmp_path / "report.json"
    ended = command(*infer, "--vary", "gate_center", 0, 4, 200, "--results", report)
    assert ended.code == 0, ended.err
    costs, _ = json.loads(report.read_text())["budgeted_batch_classification"]
    model = timm.create_model("avit_deit_nano", num_classes=4, patch_size=8)
    full = stage_gflops(model)[0]
    assert costs == sorted(costs) and costs[0] < 0.4 * full and costs[2] == pytest.approx(full, rel=0.02)
    ended = command(*infer, "--eval-mode", 0, "--results", report)
    assert ended.code == 0 and "GFLOPs per image, full depth" in ended.out
    ended = command(*infer, "--images", folder / "val" / "amber", "--gate_center", 1000)
    rows = list(csv.DictReader(ended.out.splitlines()))
    assert [float(row["GFLOPs"]) for row in rows] == pytest.approx([costs[2]] * 10, rel=1e-2)
