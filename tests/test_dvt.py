"""DVT against the published code's values, a straightforward second implementation, and early exit."""

import json
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import VECTORS, load_case, published_shapes
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import main_deit
from engine import early_exit
from models.cost import stage_gflops
from models.dvt import DVT, PREFIXES, Enlarge, ReuseBlock
from models.weights import initialise_from

CASES = ["deit_a", "deit_b", "deit_epsilons", "deit_relation_only"]
CASES += ["t2t_a", "t2t_b", "t2t_epsilons", "t2t_feature_only", "t2t_token_transformer"]
FULL = {
    "dvt_t2t_vit_12": "DVT_T2t_vit_12",
    "dvt_t2t_vit_14": "DVT_T2t_vit_14",
    "dvt_deit_small": "DVT_Deit_small",
}
SWITCHES = [(True, True), (True, False), (False, True), (False, False)]


def build_case(stem: str):
    """A case's model with its weights in evaluation mode, its description, images and expected values."""
    meta, weights, image, tensors = load_case(f"dvt_{stem}")
    same = ["embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes", "feature_reuse", "relation_reuse"]
    same += ["img_size", "tokens_type", "token_dim"]
    kwargs = {key: meta["ctor"][key] for key in same if key in meta["ctor"]}
    model = timm.create_model("dvt_deit_small" if "deit" in stem else "dvt_t2t_vit_12", **kwargs)
    model.load_state_dict(weights)
    return model.eval(), meta, image, {key: torch.from_numpy(value) for key, value in tensors.items()}


def tiny(name: str = "dvt_deit_small", **kwargs) -> DVT:
    """28 pixels for DeiT; 64 for T2T, whose grids are then 2x2, 3x3 and 4x4."""
    torch.manual_seed(0)
    sizes = dict(embed_dim=12, depth=2, num_heads=2, num_classes=5, init="fan_in")
    sizes |= dict(patch_size=2) if "deit" in name.lower() else dict(img_size=64, token_dim=8)
    return timm.create_model(name, **(sizes | kwargs)).eval()


def pictures(model: DVT, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, model.img_size, model.img_size, generator=generator)


def without_dropout(model: DVT) -> DVT:
    """In training mode, with the performer's dropout off."""
    for part in model.train().modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model


def straightforward(model: DVT, images: Tensor) -> list[Tensor]:
    """Logits of the exits, with maps, upsampling and pooling as the paper has them."""
    logits, features, maps = [], None, []
    for k, prefix in enumerate(PREFIXES):
        part = model.get_submodule(prefix)
        x, heads, side = part.embed(images), part.blocks[0].attn.num_heads, part.side
        source = model.get_submodule(PREFIXES[k - 1]).side

        def pool(grid: Tensor, side: int = side) -> Tensor:  # [B,n,s',s'] to [B,n,s*s]
            return F.adaptive_avg_pool2d(F.interpolate(grid, scale_factor=2), side).flatten(2)

        added = [0.0] * len(part.blocks)
        if k and hasattr(part, "relation_reuse_conv"):
            y = part.relation_reuse_conv(torch.cat(maps, dim=1))
            for _ in range(2):  # the last axis, then by transposing the other
                patches = y[..., 1:].flatten(1, 2).unflatten(-1, (source, source))
                y = torch.cat([y[..., :1], pool(patches).unflatten(1, y.shape[1:3])], dim=-1).transpose(2, 3)
            added = y.split(heads, dim=1)
        maps = []
        for block, bias in zip(part.blocks, added, strict=True):
            qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            maps.append(qkv[0] @ qkv[1].transpose(2, 3) * block.attn.scale + bias)
            x = x + block.attn.proj((maps[-1].softmax(dim=-1) @ qkv[2]).transpose(1, 2).flatten(2))
            wide = x
            if k and hasattr(block, "feature_resuse_mlp"):
                grid = (
                    block.feature_resuse_mlp(features)[:, 1:].transpose(1, 2).unflatten(2, (source, source))
                )
                wide = torch.cat([x, F.pad(pool(grid).transpose(1, 2), (0, 0, 1, 0))], dim=-1)
            x = x + block.mlp(block.norm2(wide))
        features = x
        logits.append(part.head(part.norm(x)[:, 0]))
    return logits


# The published code


@pytest.mark.parametrize("stem", CASES)
@torch.inference_mode()
def test_outputs_equal_the_published_codes(stem: str) -> None:
    model, meta, image, expected = build_case(stem)
    for k, out in enumerate(model(image)):
        wanted = expected[f"output.exit{k}"]
        torch.testing.assert_close(out.logits, wanted, atol=meta["tolerance"]["atol"], rtol=1e-4)


@pytest.mark.parametrize("stem", CASES)
@torch.no_grad()
def test_what_is_reused_equals_the_published_codes(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, meta, image, expected = build_case(stem)
    found, feed, attend = {}, ReuseBlock.feed, ReuseBlock.attend

    def spy_feed(block, x, features=None):
        out = feed(block, x, features)
        found[f"exit{k}.last_block_out"] = out[0]
        return out

    def spy_attend(block, x, bias=None, need=None, alone=False, *reduced):
        if bias is not None:
            added = block.enlarge.queries(block.enlarge.keys(bias))
            found[f"exit{k}.block{len(part.blocks) - 1}_added_logits"] = added[0]
        return attend(block, x, bias, need, alone, *reduced)

    monkeypatch.setattr(ReuseBlock, "feed", spy_feed)
    monkeypatch.setattr(ReuseBlock, "attend", spy_attend)
    info = {}
    without_dropout(model)
    for k, prefix in enumerate(PREFIXES):
        part = model.get_submodule(prefix)
        part.head.register_forward_pre_hook(lambda _, x, k=k: found.update({f"exit{k}.cls_feature": x[0]}))
        name = f"exit{k}.block0_reused_feature"
        part.blocks[0].norm2.register_forward_pre_hook(
            lambda _, x, name=name: found.update({name: x[0][0, :, -48:]})
        )
        info = model.stage(k, image, info).info
        if "relation" in info:
            found[f"exit{k}.block0_logits"] = info["relation"][0, : part.blocks[0].attn.num_heads]
        if "features" in info:
            assert torch.equal(info["features"][0], found[f"exit{k}.last_block_out"])
    checked = 0
    for key, wanted in expected.items():
        kind, _, name = key.partition(".")
        if kind != "inter" or "token" in name or "t2t" in name:
            continue
        name, _, where = name.partition("_s0")
        value = found[name] if name in found else None
        if value is None:
            assert name.endswith("block0_logits") and not meta["ctor"]["relation_reuse"]
            continue
        if where:
            rows = slice(int(where[1:])) if where[0] == "n" else slice(None, None, int(where[4:]))
            value = value[:, rows, rows] if wanted.ndim == 3 else value[rows]
        torch.testing.assert_close(value, wanted, atol=meta["tolerance"]["atol"], rtol=1e-4)
        checked += 1
    assert checked >= 6


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("stem", ["deit_a", "t2t_a"])
def test_losses_and_gradients_equal_the_published_codes(stem: str, training: bool) -> None:
    model, meta, image, expected = build_case(stem)
    if training:
        without_dropout(model)
    terms = model.loss(model(image), expected["input.soft_target"], SoftTargetCrossEntropy())
    torch.testing.assert_close(
        torch.stack(list(terms.values())), expected["output.loss_per_exit"], atol=0, rtol=1e-5
    )
    total = sum(terms.values())
    torch.testing.assert_close(total[None], expected["output.loss_total"], atol=0, rtol=1e-5)
    total.backward()
    parameters = dict(model.named_parameters())
    for key, value in expected.items():
        kind, _, name = key.partition(".")
        if not kind.startswith("grad"):
            continue
        gradient = parameters[name].grad
        if gradient is None:  # the small network of the last block, which evaluation leaves out
            assert not training and "normal_token.blocks.1.feature_resuse_mlp" in name
            gradient = torch.zeros_like(parameters[name])
        if kind == "grad":
            assert (gradient - value).abs().max() <= 2e-3 * value.abs().max(), name
        else:
            torch.testing.assert_close(gradient.norm()[None], value, atol=0, rtol=2e-3)


@pytest.mark.parametrize("name", FULL)
def test_state_dict_has_the_published_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(FULL[name])
    manifest = json.loads((VECTORS / f"manifest_{FULL[name]}.json").read_text())
    own = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert own == published_shapes(FULL[name])
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert sorted(frozen) == sorted(manifest["non_trainable_parameters"])
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sum(sizes) == manifest["num_params_trainable"]


@pytest.mark.parametrize("name", FULL)
def test_published_names_build_the_same_model(name: str) -> None:
    first, second = (tiny(known) for known in (name, FULL[name]))
    images = pictures(first)
    for ours, theirs in zip(first(images), second(images), strict=True):
        assert torch.equal(ours.logits, theirs.logits)
    assert first.recipe == second.recipe


# The exits


@pytest.mark.parametrize("source, side", [(7, 10), (10, 14), (7, 14), (2, 3), (3, 4), (4, 5), (5, 5), (1, 1)])
def test_enlarging_is_doubling_and_adaptive_pooling(source: int, side: int) -> None:
    enlarge = Enlarge(source, side)
    torch.testing.assert_close(enlarge.matrix.sum(dim=1), torch.ones(side))
    x = torch.randn(2, 3, source, source)
    expected = F.adaptive_avg_pool2d(F.interpolate(x, scale_factor=2, mode="nearest"), side)
    torch.testing.assert_close(enlarge.matrix @ x @ enlarge.matrix.T, expected, atol=1e-6, rtol=0)
    rows = enlarge(x.flatten(2).transpose(1, 2))  # [2,s*s,3]
    torch.testing.assert_close(rows.transpose(1, 2).unflatten(2, (side, side)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("features, relations", SWITCHES)
@pytest.mark.parametrize("name", ["dvt_deit_small", "dvt_t2t_vit_12"])
def test_outputs_and_gradients_equal_the_straightforward_ones(
    name: str, features: bool, relations: bool
) -> None:
    model = without_dropout(tiny(name, feature_reuse=features, relation_reuse=relations))
    images, gradients = pictures(model), []
    for forward in (lambda: [out.logits for out in model(images)], lambda: straightforward(model, images)):
        model.zero_grad()
        logits = torch.stack(forward())
        F.cross_entropy(logits.flatten(0, 1), torch.tensor([0, 2, 1] * 3)).backward()
        gradients.append(
            {name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"": logits}
        )
    for name, ours in gradients[0].items():
        torch.testing.assert_close(ours, gradients[1][name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("features, relations", SWITCHES)
def test_a_switch_removes_its_modules(features: bool, relations: bool) -> None:
    model = tiny(feature_reuse=features, relation_reuse=relations)
    names = list(model.state_dict())
    for word, on in (("feature_resuse_mlp", features), ("relation_reuse_conv", relations)):
        owners = {name.split(".")[0] for name in names if word in name}
        assert owners == (set(PREFIXES[1:]) if on else set())
    assert model.normal_token.blocks[0].norm2.normalized_shape == (12 + 48 * features,)
    info = model.stage(0, pictures(model), {}).info
    assert set(info) == {key for key, on in (("features", features), ("relation", relations)) if on}


@pytest.mark.parametrize("name", ["dvt_deit_small", "dvt_t2t_vit_12", "dvt_deit_nano"])
@torch.inference_mode()
def test_early_exit_equals_the_exit_taken(name: str) -> None:
    model = tiny(name)
    for prefix in PREFIXES:
        model.get_submodule(prefix).head.weight.mul_(4)
    images = pictures(model, 16)
    full = [out.logits for out in model(images)]
    chained, info = [], {}
    for k in range(model.num_exits):
        out = model.stage(k, images, info)
        chained.append(out.logits)
        assert all(len(value) == 16 for value in out.info.values())
        info = out.info
    assert all(torch.equal(a, b) for a, b in zip(full, chained, strict=True)) and info == {}
    sure = [logits.softmax(dim=-1).amax(dim=-1) for logits in full]
    mixed = [sure[0].median().item() + 1e-4, sure[1].quantile(0.4).item() + 1e-4]
    for thresholds, wanted in (([0.0, 0.0], {0}), ([1.1, 1.1], {2}), ([1.1, 0.0], {1}), (mixed, {0, 1, 2})):
        logits, exits = early_exit(model, images, thresholds)
        assert set(exits.tolist()) == wanted
        for b, k in enumerate(exits.tolist()):
            torch.testing.assert_close(logits[b], full[k][b], atol=1e-5, rtol=0)
            alone, exit = early_exit(model, images[b : b + 1], thresholds)
            assert exit.item() == k
            torch.testing.assert_close(alone[0], logits[b], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_later_exit_is_not_computed_for_those_that_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny(), []
    for prefix in PREFIXES:
        model.get_submodule(prefix).norm.register_forward_hook(lambda _, x, out: seen.append(len(x[0])))
    images = pictures(model, 8)
    first, second = sorted(model.stage(0, images, {}).logits.softmax(dim=-1).amax(dim=-1).tolist())[3:5]
    seen.clear()
    early_exit(model, images, [(first + second) / 2, 1.1])
    assert seen == [8, 4, 4]


@torch.no_grad()
@pytest.mark.parametrize("features, relations", SWITCHES)
@pytest.mark.parametrize("name", ["dvt_deit_small", "dvt_t2t_vit_12"])
def test_the_class_token_alone_is_that_of_the_whole_block(name: str, features: bool, relations: bool) -> None:
    model = tiny(name, feature_reuse=features, relation_reuse=relations)
    images = pictures(model)
    evaluated = model(images)
    for ours, full in zip(evaluated, without_dropout(model)(images), strict=True):
        torch.testing.assert_close(ours.logits, full.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("classes", [1, 2, 7])
@pytest.mark.parametrize("name", ["dvt_deit_nano", "dvt_t2t_vit_14"])
def test_any_number_of_classes(name: str, classes: int) -> None:
    model = tiny(name, num_classes=classes)
    assert model.num_classes == classes
    assert all(out.logits.shape == (3, classes) for out in model(pictures(model)))


def test_geometry_follows_the_image() -> None:
    for size, patches, padding in ((224, (32, 23, 16), 3), (56, (8, 6, 4), 2), (14, (2, 2, 1), 3)):
        for kwargs in (dict(img_size=size, patch_size=None), dict(patch_size=size // 14)):
            model = tiny(**kwargs)
            parts = [model.get_submodule(prefix) for prefix in PREFIXES]
            assert tuple(part.patch_embed.proj.kernel_size[0] for part in parts) == patches
            assert [part.padding for part in parts] == [0, padding, 0]
            assert model.img_size == size and model.patch_size == patches[-1]
    assert timm.create_model("dvt_deit_nano").img_size == 56
    assert tiny("dvt_t2t_vit_12", img_size=224).stage_names == ("7x7", "10x10", "14x14")
    assert tiny("dvt_t2t_vit_12").stage_names == ("2x2", "3x3", "4x4")


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(img_size=225, patch_size=None), "img_size 225.*14x14"),
        (dict(img_size=224, patch_size=8), "patch_size 8.*14x14"),
        (dict(embed_dim=13), "embed_dim 13 is not a multiple"),
        (dict(reuse=True), "reuse"),
        (dict(pretrained=True), "no weights are hosted"),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**kwargs)
    with pytest.raises(ValueError, match="expected .B,3,28,28."):
        tiny()(torch.randn(1, 3, 32, 32))


# Memory, cost and precision


class Shapes(TorchDispatchMode):
    """Notes the shape of everything that is computed."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.seen.add(tuple(value.shape))
        return out


def test_the_large_maps_are_made_one_block_at_a_time_and_kept_for_no_backward_pass() -> None:
    model, saved = tiny(depth=3), []
    images, n, maps = pictures(model, 1), 14 * 14 + 1, 3 * 2

    def pack(value: Tensor) -> Tensor:
        saved.append(tuple(value.shape))
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        without_dropout(model)(images)
    assert not [shape for shape in saved if shape[-2:] == (n, n)]
    # What the last exit mixes and each block's part of the result, but not what is between them.
    assert {shape[1] for shape in saved if shape[-2:] == (101, 101)} == {maps, 2}
    assert [shape[1] for shape in saved if shape[-2:] == (101, 101)].count(maps) == 1
    with Shapes() as shapes, torch.no_grad():
        model.eval()(images)
    large = [shape for shape in shapes.seen if shape[-2:] == (n, n)]
    assert large and max(math.prod(shape) for shape in large) == 2 * n * n  # the heads of one block


def saved_work(model: DVT, k: int) -> tuple[int, int, int]:
    """What ours does otherwise in exit k, in closed form.

    Returns:
        Multiply-adds of the published code left out, those in their place, and elements not normalised.
    """
    part = model.get_submodule(PREFIXES[k])
    depth, heads, e = len(part.blocks), part.blocks[0].attn.num_heads, part.embed_dim
    n, hidden = part.side**2 + 1, part.blocks[0].mlp.fc1.out_features
    net = e * 128 + 128 * 48
    saved, instead, norms = 0, 0, (n - 1) * e  # the last norm, of the class token alone
    if k:
        before = model.get_submodule(PREFIXES[k - 1]).side
        m, unit = before**2 + 1, part.side * before * (part.side + before)  # rows, then columns, of one map
        saved += depth * net  # the class token in the small networks
        norms += depth * e
        instead += depth * 48 * unit + depth * heads * (m + n) * unit
    if k == 2:  # the last block for the patches
        wide = e + 48
        saved += (n - 1) * (2 * n * e + e * e + wide * hidden + hidden * e) + (m - 1) * net
        norms += (n - 1) * wide + (m - 1) * e
        instead -= 48 * unit + heads * (m - 1 + n) * unit
    return saved, instead, norms


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_gflops_are_the_published_but_for_what_is_derived(name: str) -> None:
    """Against PyTorch's counter, exactly, and against fvcore's count of the published code.

    Ours enlarges by products of matrices and not by upsampling and pooling; it leaves the class token out of
    the small networks, and the patches out of the last block of the last exit.
    """
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    model = model.to_empty(device="cpu")  # weights of any value cost the same
    stages, image, info = stage_gflops(model), torch.zeros(1, 3, 224, 224), {}
    published = json.loads((VECTORS / "dvt_flops.json").read_text())[FULL[name]]
    for k, operators in enumerate(published["by_operator_per_exit"]):
        saved, instead, norms = saved_work(model, k)
        products = sum(operators.get(kind, 0) for kind in ("linear", "matmul", "einsum", "conv"))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            info = model.stage(k, image, info).info
        # fvcore rounds its count of einsum, which only the performers have.
        rounding = 1e-3 * operators.get("einsum", 0)
        assert counter.get_total_flops() / 2 == pytest.approx(products - saved + instead, abs=rounding)
        normalised = operators["layer_norm"] - 5 * norms
        assert stages[k] * 1e9 == pytest.approx(products - saved + instead + normalised, abs=rounding)
    cumulative = torch.tensor(stages).cumsum(0).tolist()
    assert cumulative == pytest.approx(published["cumulative_G"], rel=0.03)


@pytest.mark.parametrize("name", ["dvt_deit_small", "dvt_t2t_vit_12", "dvt_t2t_vit_14"])
def test_bfloat16_is_close(name: str) -> None:
    model = tiny(name)
    images = pictures(model)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(images)
        half = tiny(name).bfloat16()(images.bfloat16())
    for ours, mine, weights in zip(exact, mixed, half, strict=True):
        torch.testing.assert_close(mine.logits.float(), ours.logits, atol=0.05, rtol=0)
        torch.testing.assert_close(weights.logits.float(), ours.logits, atol=0.1, rtol=0)
    without_dropout(model).zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(out.logits.float().square().mean() for out in model(images))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# Training


@pytest.mark.parametrize("features, relations", SWITCHES)
@pytest.mark.parametrize("name", ["dvt_deit_small", "dvt_t2t_vit_12"])
def test_every_parameter_takes_part_in_every_step(name: str, features: bool, relations: bool) -> None:
    model = tiny(name, feature_reuse=features, relation_reuse=relations, drop_path_rate=0.3).train()
    terms = model.loss(model(pictures(model)), torch.tensor([0, 1, 4]), F.cross_entropy)
    assert list(terms) == ["exit0", "exit1", "exit2"]
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    last = model.normal_token.blocks[1]
    assert hasattr(last, "feature_resuse_mlp") == features
    if features:
        assert all((p.grad == 0).all() for p in last.feature_resuse_mlp.parameters())


def test_a_later_loss_reaches_the_earlier_exits() -> None:
    model = tiny()
    model(pictures(model))[2].logits.square().sum().backward()
    for prefix in PREFIXES:
        assert model.get_submodule(prefix).patch_embed.proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["dvt_t2t_vit_12", "dvt_deit_small"])
def test_class_tokens_and_positions_are_not_decayed(name: str) -> None:
    model = tiny(name)
    groups = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.5).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    given = {id(p) for group in groups for p in group["params"]}
    for key, parameter in model.named_parameters():
        assert (id(parameter) in given) == parameter.requires_grad, key
        matrix = parameter.ndim > 1 and not key.endswith(("_token", "pos_embed")) and parameter.requires_grad
        assert (id(parameter) in decayed) == matrix, key


@pytest.mark.slow
@pytest.mark.parametrize("run", [0, 1])
def test_recipe_gives_the_published_learning_rates(run: int) -> None:
    published = json.loads((VECTORS / "dvt_lr_schedule.json").read_text())["runs"][run]
    args, _ = main_deit.parse(["--model", published["model"], "--data-path", "here"])
    assert args.epochs + args.cooldown_epochs == len(published["values"])
    optimizer = create_optimizer_v2(nn.Linear(1, 1), **main_deit.optimizer_options(args, 256))
    scheduler, _ = create_scheduler_v2(optimizer, **main_deit.schedule_options(args, 10))
    rates = []
    for epoch in range(len(published["values"])):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(published["values"], rel=1e-6)


def test_fan_in_scales_with_the_width_in_every_exit() -> None:
    model = timm.create_model("dvt_deit_nano")
    for prefix in PREFIXES:
        part = model.get_submodule(prefix)
        mlp = part.blocks[0].mlp
        assert mlp.fc1.weight.std().item() == pytest.approx(0.7 / mlp.fc1.in_features**0.5, rel=0.05)
        assert mlp.fc2.weight.std().item() == pytest.approx(0.35 / mlp.fc2.in_features**0.5, rel=0.05)
        assert part.head.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert part.pos_embed[0, 1:].abs().max() <= 0.5 < part.pos_embed[0, 1:].abs().max() + 0.01


# Other weights


def test_a_plain_vit_starts_all_three_exits() -> None:
    torch.manual_seed(1)
    sizes = dict(embed_dim=48, depth=2, num_heads=2, num_classes=3)
    plain = timm.create_model("deit_small_patch16_224", img_size=28, patch_size=2, **sizes)
    nn.init.normal_(plain.pos_embed)
    model, state = tiny(embed_dim=48), plain.state_dict()
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    initialise_from(model, state, "plain")
    for prefix in PREFIXES:
        own = model.get_submodule(prefix).state_dict()
        start = {key: fresh[f"{prefix}.{key}"] for key in own}
        for key, value in own.items():
            if "reuse" in key or "resuse" in key or key.startswith("head."):
                assert torch.equal(value, start[key]), key
            elif key in ("pos_embed", "patch_embed.proj.weight"):
                assert prefix != "normal_token" or torch.allclose(value, state[key], atol=1e-5)
            elif value.shape == state[key].shape:
                assert torch.equal(value, state[key]), key
            else:
                assert key.split(".")[-2] in ("norm2", "fc1")
                assert torch.equal(value[..., :48], state[key]) and torch.equal(
                    value[..., 48:], start[key][..., 48:]
                )
    # A patch of one colour is embedded alike at every patch size.
    flat = torch.full((1, 3, 28, 28), 0.7)
    embedded = [model.get_submodule(prefix).patch_embed(flat[..., :24, :24])[0, 0] for prefix in PREFIXES]
    torch.testing.assert_close(embedded[0], embedded[2], atol=1e-4, rtol=0)


def test_a_t2t_vit_starts_all_three_exits() -> None:
    sizes = dict(embed_dim=48, depth=2, num_heads=2, img_size=64, token_dim=8)
    plain = timm.create_model("t2t_vit_12", num_classes=3, **sizes)
    model, state = tiny("dvt_t2t_vit_12", embed_dim=48), plain.state_dict()
    tables = [model.get_submodule(prefix).pos_embed.clone() for prefix in PREFIXES]
    initialise_from(model, state, "plain")
    for prefix, table in zip(PREFIXES, tables, strict=True):
        part = model.get_submodule(prefix)
        assert torch.equal(part.pos_embed, table)
        assert torch.equal(part.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
        second = "tokens_to_token.attention2.kqv.weight"
        assert torch.equal(part.get_parameter(second), state[second])


def test_a_cascade_starts_another_with_other_classes() -> None:
    source, model = tiny(num_classes=7), tiny()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    initialise_from(model, source.state_dict(), "cascade")
    for key, value in model.state_dict().items():
        expected = fresh if key.split(".")[1] == "head" else source.state_dict()
        assert torch.equal(value, expected[key]), key
