"""Everything about a path is in its Gram matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankleap.checkpoints import Delta, LowRank, dense
from rankleap.lowrank import gram, temporal_basis

seeds = st.integers(0, 2**31)


def deltas_of(count: int, seed: int, shape: tuple[int, int] = (6, 5)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def stacked(deltas: list[Delta]) -> torch.Tensor:
    return torch.stack([dense(delta).flatten().double() for delta in deltas])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), seeds)
def test_entries_are_inner_products_of_products_and_of_dense_deltas_alike(ranks: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    deltas: list[Delta] = [
        LowRank(torch.randn(6, r, generator=generator), torch.randn(r, 5, generator=generator))
        if r
        else torch.randn(6, 5, generator=generator)
        for r in ranks
    ]
    rows_TD = stacked(deltas)
    torch.testing.assert_close(gram(deltas), rows_TD @ rows_TD.T, atol=1e-4, rtol=1e-5)


def test_a_gram_matrix_needs_no_dense_matrix() -> None:
    side = 200_000  # the dense matrix would take 160 GB
    deltas: list[Delta] = [LowRank(torch.full((side, 1), t), torch.ones(1, side)) for t in (1.0, 2.0)]
    expected = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64) * side**2
    torch.testing.assert_close(gram(deltas), expected)


@given(st.integers(1, 6), seeds)
def test_the_basis_is_the_svd_of_the_stacked_deltas(count: int, seed: int) -> None:
    deltas = deltas_of(count, seed)
    rows_TD, basis = stacked([*deltas]), temporal_basis(gram(deltas), count)
    _, sigma, right = torch.linalg.svd(rows_TD, full_matrices=False)
    direction_RD = basis.mix_RT @ rows_TD
    overlap_R = (direction_RD * right).sum(1).abs()
    torch.testing.assert_close(overlap_R, torch.ones(count, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(basis.coords_TR, rows_TD @ direction_RD.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(basis.energy_R, sigma**2 / (sigma**2).sum(), atol=1e-6, rtol=0)
    assert float(basis.energy_R.sum()) == pytest.approx(1)
    torch.testing.assert_close(basis.coords_TR @ direction_RD, rows_TD, atol=1e-4, rtol=0)


@given(st.integers(2, 6), seeds)
def test_the_run_moves_forward_along_each_component(count: int, seed: int) -> None:
    assert bool((temporal_basis(gram(deltas_of(count, seed)), count).coords_TR[-1] >= 0).all())


def test_energy_is_a_share_of_the_whole_path_not_of_the_components_kept() -> None:
    deltas = [torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])]
    assert temporal_basis(gram(deltas), 1).energy_R.tolist() == pytest.approx([16 / 25])


def test_a_path_that_never_left_the_base_has_finite_coordinates() -> None:
    basis = temporal_basis(gram([torch.zeros(2, 2)] * 3))
    assert basis.coords_TR.tolist() == [[0.0]] * 3
    assert bool(torch.isfinite(basis.mix_RT).all())


def test_repeated_deltas_have_finite_components() -> None:
    basis = temporal_basis(gram([torch.ones(2, 2)] * 3), 3)
    assert basis.coords_TR[:, 0].tolist() == pytest.approx([2.0] * 3)
    assert bool(torch.isfinite(basis.mix_RT).all())
