"""The tokens-to-token module against the published code's values and brute force; the plain T2T-ViT."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import VECTORS, load_case, published_shapes
from safetensors.torch import load_file

import models  # noqa: F401  (registers the models)
from models.cost import exit_gflops
from models.t2t import (
    T2TViT,
    TokenPerformer,
    TokensToToken,
    TokenTransformer,
    by_pixel,
    grid_sides,
    sinusoid,
    windows,
)

CASES = ["dvt_t2t_a", "dvt_t2t_b", "dvt_t2t_epsilons", "dvt_t2t_token_transformer"]
WINDOWS = [(14, 8, 3), (11, 6, 5), (7, 4, 2)]


def tiny(**kwargs) -> T2TViT:
    torch.manual_seed(0)
    sizes = dict(img_size=48, embed_dim=16, depth=2, num_heads=2, token_dim=8, num_classes=5)
    return timm.create_model("t2t_vit_12", **(sizes | kwargs))


@pytest.mark.parametrize("count, dim", [(50, 32), (101, 24), (197, 16)])
def test_sinusoid_is_the_published_table(count: int, dim: int) -> None:
    expected = load_file(VECTORS / "dvt_sinusoid.safetensors")[f"output.n{count}_d{dim}"]
    torch.testing.assert_close(sinusoid(count, dim), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("stem", CASES)
@pytest.mark.parametrize("exit", range(3))
@torch.inference_mode()
def test_tokens_equal_the_published_codes(stem: str, exit: int) -> None:
    meta, weights, image, expected = load_case(stem)
    ctor, window = meta["ctor"], WINDOWS[exit]
    sides = grid_sides(224, window)
    module = TokensToToken(ctor["embed_dim"], sides, window, ctor["tokens_type"], ctor["token_dim"])
    prefix = f"{models.dvt.PREFIXES[exit]}.tokens_to_token."
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    module.load_state_dict(own)
    parts = {"t2t_stage1": [], "t2t_stage2": []}
    for name, part in zip(parts, (module.attention1, module.attention2), strict=True):
        part.register_forward_hook(lambda part, x, out, name=name: parts[name].append(out))
    found = {"tokens": module.eval()(image)} | {name: torch.cat(values) for name, values in parts.items()}
    assert found["tokens"].shape[1] == sides[-1] ** 2
    for name, value in found.items():
        wanted = torch.from_numpy(expected[f"inter.exit{exit}.{name}_s0n6"])
        torch.testing.assert_close(value[0, :6], wanted, atol=meta["tolerance"]["atol"], rtol=1e-4)


@pytest.mark.parametrize("window", [*WINDOWS, (3, 2, 1)])
@pytest.mark.parametrize("shape", [(2, 3, 45, 45), (1, 5, 14, 17)])
def test_windows_are_those_of_unfold_in_another_order(window: tuple, shape: tuple) -> None:
    k, stride, padding = window
    x = torch.randn(shape, requires_grad=True)
    wanted = F.unfold(x, k, stride=stride, padding=padding).transpose(1, 2)
    own = windows(x.permute(0, 2, 3, 1), window)
    assert torch.equal(own, by_pixel(wanted, shape[1]))
    weight = torch.randn_like(wanted)
    (mine,) = torch.autograd.grad(own, x, by_pixel(weight, shape[1]))
    torch.testing.assert_close(mine, *torch.autograd.grad(wanted, x, weight))


@torch.no_grad()
def test_parts_of_a_batch_are_tokenised_as_the_whole() -> None:
    """On a CPU in parts, but for a backward pass; here of 7 images, the last of 3."""
    module, images = tiny(img_size=96).eval().tokens_to_token, torch.randn(10, 3, 96, 96)
    sizes: list[int] = []
    module.attention1.register_forward_hook(lambda part, x, out: sizes.append(len(out)))
    with torch.enable_grad():
        whole = module(images)
    torch.testing.assert_close(module(images), whole, atol=1e-6, rtol=1e-5)
    assert sizes == [10, 7, 3]


@pytest.mark.parametrize("stem", CASES)
@torch.inference_mode()
def test_plain_model_equals_the_first_exit(stem: str) -> None:
    """The first exit of the cascade reuses nothing: it is a plain T2T-ViT with another first window."""
    meta, weights, image, expected = load_case(stem)
    sizes = ["embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes", "tokens_type", "token_dim"]
    kwargs = {key: meta["ctor"][key] for key in sizes}
    model = timm.create_model("t2t_vit_12", window=WINDOWS[0], **kwargs).eval()
    prefix = "less_less_token."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    wanted = torch.from_numpy(expected["output.exit0"])
    torch.testing.assert_close(model(image)[0].logits, wanted, atol=meta["tolerance"]["atol"], rtol=1e-4)


@pytest.mark.parametrize("name", ["t2t_vit_12", "t2t_vit_14"])
def test_plain_state_dict_is_that_of_the_last_exit_without_reuse(name: str) -> None:
    with torch.device("meta"):
        own = timm.create_model(name).state_dict()
    wide = own["cls_token"].shape[-1] + 48
    for key, shape in published_shapes(f"DVT_T{name[1:]}").items():
        prefix, _, key = key.partition(".")
        if prefix == "normal_token" and "reuse" not in key and "resuse" not in key:
            value = own.pop(key)
            assert [wide if n == wide else n for n in shape] == shape
            assert list(value.shape) == [wide - 48 if n == wide else n for n in shape], key
    assert not own


@pytest.mark.parametrize("name, published", [("t2t_vit_12", 1.775), ("t2t_vit_14", 4.800)])
def test_plain_gflops_are_the_published(name: str, published: float) -> None:
    assert exit_gflops(timm.create_model(name)) == [pytest.approx(published, abs=1e-3)]


@torch.inference_mode()
def test_performer_is_attention_with_its_kernel() -> None:
    torch.manual_seed(0)
    part = TokenPerformer(20, 8).eval()
    torch.nn.init.normal_(part.kqv.weight, std=0.4)
    x = torch.randn(2, 30, 20)
    k, q, v = part.kqv(part.norm1(x)).chunk(3, dim=-1)
    pairs = torch.einsum("bnm,bpm->bnp", part.features(q), part.features(k))
    y = v + part.proj(pairs / (pairs.sum(dim=-1, keepdim=True) + 1e-8) @ v)
    torch.testing.assert_close(part(x), y + part.mlp(part.norm2(y)), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_random_features_estimate_the_softmax_kernel() -> None:
    torch.manual_seed(0)
    part, (q, k) = TokenPerformer(4, 8), 0.3 * torch.randn(2, 1, 5, 8)
    torch.testing.assert_close(part.w @ part.w.T, 4 * torch.eye(4), atol=1e-5, rtol=0)
    part.w.data = torch.randn(400_000, 8)
    products = part.features(q) @ part.features(k).transpose(1, 2)
    torch.testing.assert_close(products, (q @ k.transpose(1, 2)).exp(), atol=0, rtol=0.1)


@torch.inference_mode()
def test_softmax_tokeniser_is_scaled_by_its_input() -> None:
    torch.manual_seed(0)
    part = TokenTransformer(20, 8).eval()
    x = torch.randn(2, 30, 20)
    q, k, v = part.attn["qkv"](part.norm1(x)).chunk(3, dim=-1)
    y = v + part.attn["proj"]((q @ k.transpose(1, 2) / 20**0.5).softmax(dim=-1) @ v)
    torch.testing.assert_close(part(x), y + part.mlp(part.norm2(y)), atol=1e-6, rtol=1e-5)


@torch.inference_mode()
def test_autocast_does_not_reach_the_performer() -> None:
    torch.manual_seed(0)
    part, x = TokenPerformer(20, 8).eval(), torch.randn(2, 30, 20)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = part(x)
    assert torch.equal(mixed, part(x))
    assert torch.equal(part.bfloat16()(x.bfloat16()).isfinite(), torch.ones(2, 30, 8, dtype=torch.bool))


def test_dropout_belongs_to_the_performer_in_training_alone() -> None:
    torch.manual_seed(0)
    part, x = TokenPerformer(20, 8), torch.randn(1, 30, 20)
    assert not torch.equal(part(x), part(x))
    assert torch.equal(part.eval()(x), part(x))


@pytest.mark.parametrize("init", ["deit", "fan_in"])
def test_fixed_tables_are_stored_and_neither_drawn_nor_trained(init: str) -> None:
    model = tiny(init=init)
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert (
        fixed
        == {f"tokens_to_token.attention{i}.w" for i in (1, 2)} | {"pos_embed"}
        <= set(model.state_dict())
    )
    assert torch.equal(model.pos_embed, sinusoid(10, 16))
    other = tiny(init=init)
    other.load_state_dict(model.adapt_state_dict(model.state_dict()), strict=False)
    assert "pos_embed" not in model.adapt_state_dict(model.state_dict())


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("size", [32, 45, 64, 100, 224])
@torch.inference_mode()
def test_any_image_size(window: tuple, size: int) -> None:
    model = tiny(img_size=size, window=window).eval()
    side = grid_sides(size, window)[-1]
    x = torch.randn(1, 3, size, size)
    for k, stride, padding in (window, (3, 2, 1), (3, 2, 1)):
        x = F.max_pool2d(x, k, stride, min(padding, k // 2))
    assert x.shape[-1] == side and model.pos_embed.shape[1] == side**2 + 1
    assert model(torch.randn(1, 3, size, size))[0].logits.shape == (1, 5)
    with pytest.raises(ValueError, match=f"expected .B,3,{size},{size}."):
        model(torch.randn(1, 3, size + 1, size + 1))


def test_a_copy_has_its_own_tokeniser() -> None:
    """The tokeniser has two names in the model, as a part and as the function that makes the patches."""
    model = tiny().eval()
    twin, image = copy.deepcopy(model), torch.randn(1, 3, 48, 48)
    before = model(image)[0].logits
    with torch.no_grad():
        twin.tokens_to_token.project.weight.zero_()
    assert torch.equal(model(image)[0].logits, before) and not torch.equal(twin(image)[0].logits, before)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(tokens_type="convolution"), "take one of performer, transformer"),
        (dict(token_dim=1), "token_dim is 1"),
        (dict(img_size=0), "img_size is"),
        (dict(patch_size=16), "patch_size"),
        (dict(pretrained=True), "no weights are hosted"),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**kwargs)
