"""LF-ViT against the published code's outputs, against plain attention and against itself."""

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import build_case, check_outputs, published_shapes
from timm.optim import create_optimizer_v2

import models  # noqa: F401  (registers the models)
from engine import early_exit
from models.lf_vit import LFViT
from models.selection import refine
from models.vit import Attention, Block, StageOutput

CASES = ["lf_deit_7x7_m5", "lf_deit_9x9_m8_p8", "lf_deit_9x9_m8_p16"]
TINY = dict(patch_size=2, embed_dim=8, depth=2, num_heads=2, num_classes=3, init="fan_in")


def tiny(seed: int = 0, **kwargs) -> LFViT:
    torch.manual_seed(seed)
    return timm.create_model("lf_deit_small", **(TINY | kwargs))


def images_for(model: LFViT, batch: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(
        batch, 3, model.img_size, model.img_size, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("stem", CASES)
def test_outputs_equal_the_published_codes(stem: str) -> None:
    check_outputs(stem)


@pytest.mark.parametrize("stem", CASES)
@torch.no_grad()
def test_training_before_selection_sees_every_patch_with_its_position(stem: str) -> None:
    model, _, image, expected = build_case(stem)
    model.train()
    model.selecting = False
    second = model(image)[1]
    torch.testing.assert_close(second.logits, expected["output.stage1_dense_with_pos"], atol=1e-4, rtol=0)
    assert (second.info["kept"].sort().values == torch.arange(4 * model.stage_size**2)).all()


@pytest.mark.parametrize("size, name", [(7, "lf_deit_small"), (9, "lf_deit_small_9x9")])
def test_state_dict_has_the_published_names_and_shapes(size: int, name: str) -> None:
    own = timm.create_model("lf_deit_small", location_stage_size=size).state_dict()
    assert {key: list(value.shape) for key, value in own.items()} == published_shapes(name)


@pytest.mark.parametrize("stage_size, region_size", [(7, 5), (9, 8), (4, 4), (12, 8)])
def test_region_size_defaults(stage_size: int, region_size: int) -> None:
    assert tiny(location_stage_size=stage_size).region_size == region_size


GRIDS = [(g, m) for g in range(4, 13) for m in range(1, g + 1)]


@pytest.mark.parametrize("g, m", GRIDS)
@torch.inference_mode()
def test_every_grid_and_region_covers_the_image_once(g: int, m: int) -> None:
    """Refined and coarse patches together tile the image; refined ones lie in the region that is reported."""
    model = tiny(location_stage_size=g, region_size=m).eval()
    attention = torch.rand(3, g * g, generator=torch.Generator().manual_seed(g * m))
    refined, rest, info = model.select(attention)
    assert refined.shape[1] == -int(-0.88 * m * m // 1)
    assert (torch.cat([refined, rest], dim=1).sort().values == torch.arange(g * g)).all()
    kept = refine(refined, g)
    left, top, right, bottom = info["region"].T[..., None]
    assert ((right - left == 2 * m) & (bottom - top == 2 * m)).all()
    row, column = kept // (2 * g), kept % (2 * g)
    assert ((left <= column) & (column < right) & (top <= row) & (row < bottom)).all()
    within = attention.gather(1, refined).min(dim=1).values
    square = torch.zeros(3, g, g, dtype=torch.bool)
    for b in range(3):
        square[b, top[b] // 2 : bottom[b] // 2, left[b] // 2 : right[b] // 2] = True
    square.view(3, -1).scatter_(1, refined, False)  # the square's patches that stay coarse
    assert (attention.masked_fill(~square.view(3, -1), 0).max(dim=1).values <= within).all()
    logits, exits = early_exit(model, images_for(model, 2), [1.1])
    assert logits.shape == (2, 3) and (exits == 1).all()


@pytest.mark.parametrize("batch", [1, 2, 7])
@torch.inference_mode()
def test_early_exit_is_the_full_forward_at_the_exit_taken(batch: int) -> None:
    model = tiny().eval()
    images = images_for(model, batch)
    full = torch.stack([out.logits for out in model(images)])
    middle = full[0].softmax(dim=-1).amax(dim=-1).median().item()
    for threshold in (0.0, middle, 1.1):
        logits, exits = early_exit(model, images, [threshold])
        torch.testing.assert_close(logits, full[exits, torch.arange(batch)], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_batch_of_one_is_a_row_of_the_batch() -> None:
    model = tiny().eval()
    images = images_for(model, 5)
    whole = model(images)
    for row in range(5):
        for alone, together in zip(model(images[row : row + 1]), whole, strict=True):
            torch.testing.assert_close(alone.logits[0], together.logits[row], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_attention_equals_the_plain_formula_and_its_class_row() -> None:
    torch.manual_seed(0)
    attention, x, bias = Attention(12, 3), torch.randn(2, 6, 12), torch.randn(2, 3, 6, 6)
    for b in (None, bias):
        q, k, v = attention.qkv(x).reshape(2, 6, 3, 3, 4).permute(2, 0, 3, 1, 4)
        full = (q @ k.transpose(-2, -1) * 4**-0.5 + (0 if b is None else b)).softmax(dim=-1)
        out, row = attention(x, b, need="cls")
        torch.testing.assert_close(out, attention.proj((full @ v).transpose(1, 2).reshape(2, 6, 12)))
        torch.testing.assert_close(row, full.mean(dim=1)[:, 0, 1:])
        assert attention(x, b)[1] is None


@torch.inference_mode()
def test_the_class_row_survives_large_activations_in_half_precision() -> None:
    q = k = torch.full((1, 1, 5, 64), 33.0, dtype=torch.float16)  # q k^T is beyond the range of float16
    torch.testing.assert_close(Attention(64, 1).class_row(q, k, None), torch.full((1, 4), 0.2))


@torch.inference_mode()
def test_residual_scale_divides_both_branches() -> None:
    torch.manual_seed(0)
    block, x = Block(8, 2, residual_scale=2.0), torch.randn(2, 5, 8)
    middle = x + block.attn(block.norm1(x))[0] / 2
    torch.testing.assert_close(block(x), middle + block.mlp(block.norm2(middle)) / 2)


@torch.inference_mode()
def test_embedding_some_patches_equals_the_convolution_there() -> None:
    model = tiny()
    images = images_for(model, 2)
    index = torch.stack([torch.randperm(196, generator=torch.Generator().manual_seed(s))[:9] for s in (0, 1)])
    whole = model.patch_embed(images)
    expected = torch.stack([whole[b, index[b]] for b in range(2)])
    torch.testing.assert_close(model.embed_patches(images, {}, index), expected)


def gradients(model: LFViT, images: torch.Tensor) -> set[str]:
    model.zero_grad()
    terms = model.loss(model(images), torch.arange(len(images)) % 3, F.cross_entropy)
    sum(terms.values()).backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_every_parameter_learns_before_and_after_selection_starts() -> None:
    """DistributedDataParallel without a search for unused parameters needs this."""
    model = tiny(select_from_epoch=3).train()
    everything = {name for name, _ in model.named_parameters()}
    for epoch, selecting in ((0, False), (2.9, False), (3, True)):
        model.set_epoch(epoch)
        assert model.selecting == selecting
        assert gradients(model, images_for(model, 3)) == everything
    assert not model.varying_graph


def test_coarse_only_epochs_train_the_first_stage_alone() -> None:
    model = tiny(coarse_only_epochs=1).train()
    model.set_epoch(0.5)
    untouched = {name for name, _ in model.named_parameters()} - gradients(model, images_for(model, 3))
    assert all(name.startswith(("reuse_block", "pos_embed_list.1")) for name in untouched) and untouched
    assert len(model.eval()(images_for(model, 3))) == 2  # evaluation always runs what inference runs
    assert model.varying_graph
    model.train().set_epoch(1)
    assert gradients(model, images_for(model, 3)) == {name for name, _ in model.named_parameters()}


def test_loss_is_cross_entropy_of_the_focus_plus_divergence_of_the_location() -> None:
    model, target = tiny(), torch.tensor([0, 1, 2, 0])
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True).unbind()
    outputs = [StageOutput(one, {}) for one in logits]
    p = outputs[1].logits.softmax(dim=-1)
    divergence = (p * (p.log() - outputs[0].logits.softmax(dim=-1).log())).sum(dim=-1).mean()
    terms = model.loss(outputs, target, F.cross_entropy)
    assert terms["fine_ce"].item() == pytest.approx(F.cross_entropy(outputs[1].logits, target).item())
    assert terms["coarse_kl"].item() == pytest.approx(divergence.item(), rel=1e-4)
    # The target distribution is a teacher: its own head learns from the labels only.
    (grad,) = torch.autograd.grad(terms["coarse_kl"], outputs[1].logits, allow_unused=True)
    assert grad is None


def test_positions_and_class_token_are_not_decayed() -> None:
    model = tiny()
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    still = {
        names[id(p)]
        for group in optimizer.param_groups
        if group["weight_decay"] == 0
        for p in group["params"]
    }
    assert {"cls_token", "pos_embed_list.0", "pos_embed_list.1", "norm.weight", "head.bias"} <= still
    assert "head.weight" not in still


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(region_size=9), "region_size is 9: take 1 to 7"),
        (dict(region_size=0), "take 1 to 7"),
        (dict(alpha=0), "alpha is 0"),
        (dict(location_stage_size=0), "stage size is 0"),
        (dict(num_heads=5), "not a multiple of num_heads"),
        (dict(nonsense=1), "takes no nonsense"),
        (dict(init="magic"), "take 'deit' or 'fan_in'"),
        (dict(pretrained=True), "no weights are hosted"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny(**kwargs)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[B,3,28,28\]"):
        tiny()(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("name", ["lf_deit_nano", "deit_nano"])
@pytest.mark.parametrize("init", ["deit", "fan_in"])
def test_initialisation_is_finite_and_starts_near_uniform(name: str, init: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, init=init).eval()
    for out in model(torch.randn(4, 3, 56, 56)):
        assert (out.logits.softmax(dim=-1) - 0.1).abs().max() < 0.12
