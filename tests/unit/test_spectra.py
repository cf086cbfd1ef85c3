"""Spectra: what is known of a matrix in closed form comes out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankleap.checkpoints import LowRank, dense
from rankleap.lowrank.factors import base_basis, energy_in_base, spectrum

seeds = st.integers(0, 2**31)
sizes = st.integers(2, 12)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(sizes, sizes, st.integers(1, 4), seeds)
def test_a_product_has_the_spectrum_of_its_dense_matrix(rows: int, columns: int, rank: int, seed: int) -> None:
    product = LowRank(normal(rows, rank, seed=seed), normal(rank, columns, seed=seed + 1))
    sigma, whole = spectrum(product), spectrum(dense(product))
    kept = min(len(sigma), len(whole))
    torch.testing.assert_close(sigma[:kept], whole[:kept], atol=1e-4, rtol=1e-4)
    assert float(whole[kept:].abs().sum()) < 1e-3


@given(sizes, sizes, seeds)
def test_energy_on_the_bases_own_directions_sums_to_what_lies_there(rows: int, columns: int, seed: int) -> None:
    weight, delta = normal(rows, columns, seed=seed), normal(rows, columns, seed=seed + 1)
    basis = base_basis(weight)
    on_pairs, outside = energy_in_base(delta, basis)
    first = basis.left_MK[:, 0] @ delta @ basis.right_KN[0]
    assert float(on_pairs[0]) == pytest.approx(float(first**2 / delta.square().sum()), abs=1e-5)
    assert float(outside[0]) == pytest.approx(1 - float(on_pairs[0]), abs=1e-5)
    assert bool((outside.diff() <= 1e-6).all())
    if rows == columns:
        assert float(outside[-1]) == pytest.approx(0, abs=1e-5)


def test_a_delta_along_the_base_is_all_principal() -> None:
    weight = normal(8, 6, seed=0)
    basis = base_basis(weight)
    along = 3.0 * torch.outer(basis.left_MK[:, 0], basis.right_KN[0])
    across = torch.outer(basis.left_MK[:, 5], basis.right_KN[5])
    assert float(energy_in_base(along, basis)[1][0]) == pytest.approx(0, abs=1e-5)
    assert energy_in_base(across, basis)[1].tolist()[:5] == pytest.approx([1.0] * 5, abs=1e-5)


def test_a_product_needs_no_other_path() -> None:
    product = LowRank(normal(8, 2, seed=1), normal(2, 6, seed=2))
    basis = base_basis(normal(8, 6, seed=0))
    for ours, whole in zip(energy_in_base(product, basis), energy_in_base(dense(product), basis), strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-5, rtol=0)
