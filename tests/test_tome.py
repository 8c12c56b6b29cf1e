"""Tests of token merging against timm's DeiT, a loop over tokens, and conserved quantities."""

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import unset
from torch import Tensor
from torch.testing import assert_close

from inference.pictures import draw, explain_batch, group_map
from models.cost import exit_gflops
from models.tome import ToMe, match, merge

TINY = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=5)  # 17 tokens


def tiny(**kwargs: object) -> ToMe:
    torch.manual_seed(0)
    model = timm.create_model("tome_deit_small", **TINY | kwargs).eval()
    for parameter in model.parameters():  # spread out: fresh weights make all tokens alike
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def merge_by_loop(x: Tensor, keys: Tensor, size: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """One image's tokens [N,C] after `r` merges, token by token, and how many patches each stands for."""
    count, partner, score = len(x), {}, {}
    for i in range(0, count, 2):
        for j in range(1, count, 2):
            if i == 0 or j < prefix:
                continue
            similarity = F.cosine_similarity(keys[i], keys[j], dim=0).item()
            if i not in score or similarity > score[i] + 1e-6:
                score[i], partner[i] = similarity, j
    gone = sorted(score, key=lambda i: -score[i])[:r]
    order = [i for i in range(0, count, 2) if i not in gone] + list(range(1, count, 2))
    rows, sizes = [], []
    for token in order:
        members = [token] + [i for i in gone if partner[i] == token]
        total = sum(size[i] for i in members)
        rows.append(sum(size[i] * x[i] for i in members) / total)
        sizes.append(total)
    return torch.stack(rows), torch.stack(sizes)


@pytest.mark.parametrize(
    "count, r, prefix", [(17, 5, 1), (18, 8, 1), (17, 8, 1), (18, 3, 2), (9, 0, 1), (10, 4, 2)]
)
def test_merging_is_that_of_a_loop_with_its_gradient(count: int, r: int, prefix: int) -> None:
    generator = torch.Generator().manual_seed(count + r)
    x, keys = (torch.randn(3, count, width, generator=generator) for width in (6, 4))
    size = torch.randint(1, 5, (3, count), generator=generator).float()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    merged, sizes = merge(ours, size, match(keys, r, prefix), count - r)
    loops = [merge_by_loop(*image, r, prefix) for image in zip(theirs, keys, size, strict=True)]
    expected, expected_sizes = map(torch.stack, zip(*loops, strict=True))
    assert_close(merged, expected)
    assert_close(sizes, expected_sizes)
    weights = torch.randn(merged.shape, generator=generator)
    (merged * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(ours.grad, theirs.grad)


def test_of_equal_tokens_the_first_merge() -> None:
    places = match(torch.ones(1, 9, 4), 2)
    assert places.tolist() == [[0, 3, 3, 4, 3, 5, 1, 6, 2]]


@pytest.mark.parametrize("r, falling", [(2, False), (3, True), (100, False)])
def test_every_patch_is_in_one_token_and_the_class_token_alone(r: int, falling: bool) -> None:
    model, images = tiny(r=r, falling=falling), torch.randn(4, 3, 32, 32)
    info = model(images)[0].info
    size, groups = info["token_size"], info["token_group"]
    assert size.sum(dim=1).tolist() == [17] * 4
    counts = F.one_hot(groups, size.shape[1]).sum(dim=1)
    assert torch.equal(counts, size.long())
    assert groups[:, 0].tolist() == [0] * 4 and counts[:, 0].tolist() == [1] * 4
    assert size.shape[1] == {2: 17 - 6, 3: 17 - 6 - 3, 100: 3}[r]


def test_without_merging_it_is_timms_model() -> None:
    theirs = timm.create_model("deit_tiny_patch16_224", img_size=64, num_classes=7).eval()
    sizes = dict(img_size=64, embed_dim=192, num_heads=3, num_classes=7)
    ours = timm.create_model("tome_deit_small", **sizes, r=0).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        assert_close(ours(images)[0].logits, theirs(images), atol=1e-5, rtol=0)
        ours.r = 2
        assert (ours(images)[0].logits - theirs(images)).abs().max() > 1e-4


def test_the_model_is_blocks_with_a_loop_between() -> None:
    """Attention with the logarithm of sizes, then merging, then the MLP."""
    model, images = tiny(r=3), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = []
        for x in model.embed(images):
            size = torch.ones(len(x))
            for block in model.blocks:
                q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, -1)).permute(1, 2, 0, 3)
                weights = (q @ k.transpose(1, 2) * block.attn.scale + size.log()).softmax(dim=-1)
                x = x + block.attn.proj((weights @ v).transpose(0, 1).flatten(1))
                x, size = merge_by_loop(x, k.mean(dim=0), size, 3, 1)
                x = x + block.mlp(block.norm2(x))
            expected.append(model.head(model.norm(x[0])))
        assert_close(model(images)[0].logits, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_an_image_does_not_depend_on_its_batch() -> None:
    model, images = tiny(r=3), torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        assert_close(model(images)[0].logits[2:3], model(images[2:3])[0].logits)
        assert model(images[:0])[0].logits.shape == (0, 5)


def test_training_reaches_every_weight() -> None:
    model = tiny(r=3).train()
    terms = model.loss(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1]), F.cross_entropy)
    sum(terms.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("r, falling", [(0, False), (13, False), (8, True)])
def test_gflops_are_those_of_the_closed_form(r: int, falling: bool) -> None:
    model, dim, n = unset("tome_deit_small", r=r, falling=falling), 384, 197
    total = 196 * 768 * dim + dim * 1000
    for i in range(12):
        merged = 2 * r * (11 - i) // 11 if falling else r
        total += 4 * n * dim**2 + 2 * n**2 * dim + (n + 1) // 2 * (n // 2) * 64 * (merged > 0)
        n -= merged
        total += 8 * n * dim**2
    assert exit_gflops(model)[0] == pytest.approx(total / 1e9, rel=5e-3)


def test_wrong_numbers_say_so() -> None:
    for r in (-1, 2.5, "4"):
        with pytest.raises(ValueError, match="whole number from 0 up|r is .*, not int"):
            tiny(r=r)


def test_a_traced_stage_is_the_model() -> None:
    model, images = tiny(r=3), torch.randn(4, 3, 32, 32)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> Tensor:
            return self.model.stage(0, images, {}).logits

    batch = {"images": {0: torch.export.Dim("batch", min=1, max=16)}}
    program = torch.export.export(Logits(), (images,), dynamic_shapes=batch).module()
    with torch.no_grad():
        for count in (1, 2, 3):
            assert_close(program(images[:count]), model(images[:count])[0].logits)


def test_a_group_is_drawn_in_its_mean_colour() -> None:
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    image[:, :2, :2], image[:, 2:, 2:] = 100, 40
    drawn = group_map(image, torch.tensor([[1, 0], [2, 1]]))
    assert drawn[0, ::2, ::2].tolist() == [[70, 0], [0, 70]]
    model = tiny(r=3)
    config = {"mean": [0.5] * 3, "std": [0.5] * 3}
    item = explain_batch(model, torch.rand(1, 3, 32, 32), None, config, [])[0]
    assert item.groups.shape == (4, 4) and item.drops == 1
    assert (
        draw(item, model.stage_names).shape[-1]
        > draw(item._replace(groups=None), model.stage_names).shape[-1]
    )
