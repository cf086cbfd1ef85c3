"""A product behaves as the matrix that it stands for, and stays a product."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankleap.checkpoints import Delta, LowRank, combine, dense, inner, is_zero
from rankleap.checkpoints.delta import require_finite
from rankleap.errors import NotFiniteError

sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)


def product(rows: int, columns: int, rank: int, generator: torch.Generator) -> LowRank:
    left = torch.randn(rows, rank, generator=generator)
    return LowRank(left, torch.randn(rank, columns, generator=generator))


@given(sizes, sizes, sizes, sizes, seeds)
def test_an_inner_product_needs_no_dense_matrix(rows: int, columns: int, rank: int, other: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (product(rows, columns, r, generator) for r in (rank, other))
    expected = float((dense(first).double() * dense(second).double()).sum())
    scale = float(dense(first).norm() * dense(second).norm())
    pairs: list[tuple[Delta, Delta]] = [(first, second), (dense(first), second), (first, dense(second))]
    for a, b in pairs:
        assert inner(a, b) == pytest.approx(expected, abs=1e-5 * scale)


@given(sizes, sizes, st.lists(st.tuples(sizes, st.floats(-3, 3)), min_size=1, max_size=4), seeds)
def test_a_sum_of_products_is_a_product_of_the_same_matrix(
    rows: int, columns: int, terms: list[tuple[int, float]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    products = [product(rows, columns, rank, generator) for rank, _ in terms]
    weights = [weight for _, weight in terms]
    total = combine(zip(weights, products, strict=True))
    assert isinstance(total, LowRank)
    assert total.shape == (rows, columns)
    expected = sum((w * dense(p).double() for w, p in zip(weights, products, strict=True)), torch.zeros(1).double())
    torch.testing.assert_close(dense(total).double(), expected, atol=1e-4, rtol=1e-4)
    mixed = combine(zip([*weights, 1.0], [*products, torch.zeros(rows, columns)], strict=True))
    assert isinstance(mixed, Tensor)
    torch.testing.assert_close(mixed.double(), expected, atol=1e-4, rtol=1e-4)


def test_a_sum_leaves_its_terms_alone() -> None:
    terms = [torch.ones(2, 2), torch.full((2, 2), 3.0)]
    assert torch.equal(dense(combine(zip([2.0, 1.0], terms, strict=True))), torch.full((2, 2), 5.0))
    assert torch.equal(terms[0], torch.ones(2, 2))


@pytest.mark.parametrize(
    "delta",
    [
        torch.zeros(3),
        torch.zeros(2, 3),
        LowRank(torch.zeros(2, 4), torch.ones(4, 3)),
        LowRank(torch.ones(2, 4), torch.zeros(4, 3)),
        LowRank(torch.zeros(2, 0), torch.zeros(0, 3)),
    ],
    ids=["vector", "matrix", "left", "right", "empty"],
)
def test_zero_is_exactly_zero(delta: Delta) -> None:
    assert is_zero(delta)
    assert not dense(delta).any()


def test_the_smallest_number_is_not_zero() -> None:
    assert not is_zero(torch.tensor([0.0, 1e-38]))
    assert not is_zero(LowRank(torch.full((2, 1), 1e-30), torch.full((1, 2), 1e-30)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_name(bad: float) -> None:
    for delta in (torch.tensor([1.0, bad]), LowRank(torch.tensor([[bad]]), torch.ones(1, 1))):
        with pytest.raises(NotFiniteError, match="layer has NaN or infinity in step 20"):
            require_finite(delta, "layer", "step 20")
    fine = torch.ones(2)
    assert require_finite(fine, "layer", "step 20") is fine
