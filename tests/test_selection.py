"""Selection policies against brute force over every grid and region."""

import itertools

import pytest
import torch

from models.selection import best_region, bounding_box, refine, region_table, take, top_patches

GRIDS = [(g, m) for g in range(4, 13) for m in range(1, g + 1)]


def brute_force_region(scores: list[float], g: int, m: int) -> tuple[int, list[int]]:
    """Raster scan over all squares; the first of equal sums wins."""
    best, winner, patches = -1.0, 0, []
    for number, (top, left) in enumerate(itertools.product(range(g - m + 1), repeat=2)):
        square = [(top + r) * g + left + c for r in range(m) for c in range(m)]
        total = sum(scores[t] for t in square)
        if total > best:
            best, winner, patches = total, number, square
    return winner, patches


@pytest.mark.parametrize("g, m", GRIDS)
def test_best_region_is_the_brute_force_square(g: int, m: int) -> None:
    generator = torch.Generator().manual_seed(100 * g + m)
    # Whole numbers: sums are exact, so that ties happen and rounding does not decide them.
    scores = torch.randint(0, 50, (8, g * g), generator=generator).double()
    table = region_table(g, m)
    for row, winner in zip(scores, best_region(scores, g, m), strict=True):
        number, patches = brute_force_region(row.tolist(), g, m)
        assert winner == number
        assert table[winner, : m * m].tolist() == patches


@pytest.mark.parametrize("g, m", GRIDS)
def test_region_table_rows_are_permutations_in_raster_order(g: int, m: int) -> None:
    table = region_table(g, m)
    assert table.shape == ((g - m + 1) ** 2, g * g)
    assert (table.sort(dim=-1).values == torch.arange(g * g)).all()
    for part in (table[:, : m * m], table[:, m * m :]):
        assert (part.diff(dim=-1) > 0).all()


def test_the_first_of_equal_regions_wins() -> None:
    assert best_region(torch.ones(1, 49), 7, 3).item() == 0


@pytest.mark.parametrize("m", [0, 8, -1])
def test_a_region_that_does_not_fit_is_refused(m: int) -> None:
    with pytest.raises(ValueError, match="take 1 to 7"):
        region_table(7, m)


@pytest.mark.parametrize("g", range(1, 13))
def test_refine_gives_each_patch_its_four_children(g: int) -> None:
    coarse = torch.randperm(g * g, generator=torch.Generator().manual_seed(g))[None]
    k = coarse.shape[1]
    children = refine(coarse, g)[0]
    for child, (down, right) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        for at, t in enumerate(coarse[0].tolist()):
            row, column = divmod(t, g)
            assert children[child * k + at] == (2 * row + down) * 2 * g + 2 * column + right
    assert children.sort().values.tolist() == list(range(4 * g * g))  # all children of all patches, once each


def test_the_bounding_box_is_the_smallest_around_the_patches() -> None:
    index = torch.stack(
        [torch.randperm(49, generator=torch.Generator().manual_seed(s))[:5] for s in range(20)]
    )
    for patches, (left, top, right, bottom) in zip(
        index.tolist(), bounding_box(index, 7).tolist(), strict=True
    ):
        rows, columns = zip(*(divmod(t, 7) for t in patches), strict=True)
        assert (min(columns), min(rows), max(columns) + 1, max(rows) + 1) == (left, top, right, bottom)


def test_top_patches_are_sorted_and_stable() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0, 0.0]])
    assert top_patches(scores, 3).tolist() == [[1, 3, 2]]


def test_take_gathers_rows_and_broadcasts_a_shared_table() -> None:
    x = torch.arange(24.0).reshape(2, 4, 3)
    index = torch.tensor([[3, 0], [1, 1]])
    assert torch.equal(take(x, index), torch.stack([x[0, [3, 0]], x[1, [1, 1]]]))
    assert torch.equal(take(x[:1], index), torch.stack([x[0, [3, 0]], x[0, [1, 1]]]))
