"""Triplets are the SVD's, by whichever of the three ways; the certificate is true."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankleap.checkpoints import Delta, LowRank, dense
from rankleap.errors import NotConvergedError
from rankleap.lowrank import Factors, factorise, rank_one_shares
from rankleap.lowrank.factors import FULL_SVD_SIDE

sizes = st.integers(1, 24)
seeds = st.integers(0, 2**31)


def matrix_of(rows: int, columns: int, spectrum: Sequence[float], seed: int = 0) -> Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    sigma_K = torch.tensor(spectrum, dtype=torch.float64)
    sides = [torch.randn(side, len(spectrum), generator=generator, dtype=torch.float64) for side in (rows, columns)]
    left_MK, right_NK = (torch.linalg.qr(side)[0] for side in sides)
    return ((left_MK * sigma_K) @ right_NK.T).float()


def residual_of(factors: Factors, delta: Delta) -> Tensor:
    """The certificate, computed anew in float64 from the dense matrix."""
    delta_MN = dense(delta).double()
    left_MR, sigma_R, right_RN = (p.double() for p in (factors.left_MR, factors.sigma_R, factors.right_RN))
    forward_R = (delta_MN @ right_RN.T - left_MR * sigma_R).norm(dim=0)
    backward_R = (delta_MN.T @ left_MR - right_RN.T * sigma_R).norm(dim=0)
    return torch.maximum(forward_R, backward_R) / sigma_R[0]


def assert_orthonormal(factors: Factors) -> None:
    eye = torch.eye(len(factors.sigma_R))
    torch.testing.assert_close(factors.left_MR.T @ factors.left_MR, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(factors.right_RN @ factors.right_RN.T, eye, atol=1e-5, rtol=0)


@given(sizes, sizes, seeds)
def test_all_triplets_rebuild_the_matrix(rows: int, columns: int, seed: int) -> None:
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    factors = factorise(delta, min(rows, columns))
    assert_orthonormal(factors)
    torch.testing.assert_close(dense(factors.low_rank()), delta, atol=1e-4, rtol=0)
    assert factors.norm == pytest.approx(float(delta.norm()), rel=1e-5)
    assert factors.nuclear == pytest.approx(float(factors.sigma_R.sum()), rel=1e-5)


@given(sizes, sizes, st.integers(1, 30), st.integers(1, 6), seeds)
def test_a_product_is_factored_as_its_dense_matrix(rows: int, columns: int, inner: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
    product = LowRank(left, right)
    factors, kept = factorise(product, rank), min(rank, inner, rows, columns)
    sigma = torch.linalg.svdvals(dense(product).double())
    assert factors.sigma_R.shape == (kept,)
    assert_orthonormal(factors)
    torch.testing.assert_close(factors.sigma_R.double(), sigma[:kept], atol=2e-6 * float(sigma[0]), rtol=0)
    assert float(residual_of(factors, product).max()) < 1e-5
    assert factors.norm == pytest.approx(float(sigma.norm()), rel=1e-5)
    assert factors.nuclear == pytest.approx(float(sigma.sum()), rel=1e-4)


SPECTRA = {
    "gap of 2": [2.0 * 2.0**-i for i in range(400)],
    "gap of 1.03": [1.03**-i for i in range(400)],
    "gap of 1.003": [1.003**-i for i in range(400)],
    "two equal": [1.0, 1.0, *[0.3] * 398],
    "rank 1": [1.0, *[0.0] * 399],
    "rank 2 in noise": [1.0, 0.5, *[1e-5] * 398],
    "tiny": [1e-9 * 1.1**-i for i in range(400)],
}


@pytest.mark.parametrize("shape", [(400, 440), (440, 400)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_iterative_way_finds_the_triplets_of_the_full_svd(spectrum: str, shape: tuple[int, int]) -> None:
    assert min(shape) > FULL_SVD_SIDE
    delta = matrix_of(*shape, SPECTRA[spectrum])
    factors = factorise(delta, 4)
    sigma = torch.tensor(SPECTRA[spectrum][:4])
    torch.testing.assert_close(factors.sigma_R, sigma, atol=1e-5 * float(sigma[0]), rtol=0)
    assert_orthonormal(factors)
    residual_R = residual_of(factors, delta)
    assert float(residual_R.max()) < 1e-5
    torch.testing.assert_close(factors.residual_R.double(), residual_R, atol=1e-6, rtol=0)
    assert factors.nuclear is None
    assert factors.norm == pytest.approx(float(delta.norm()), rel=1e-5)


def test_the_three_ways_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    product = LowRank(torch.randn(400, 5, generator=generator), torch.randn(5, 440, generator=generator))
    by_core, by_lanczos = factorise(product, 3), factorise(dense(product), 3)
    torch.testing.assert_close(by_core.left_MR, by_lanczos.left_MR, atol=1e-5, rtol=0)
    torch.testing.assert_close(by_core.right_RN, by_lanczos.right_RN, atol=1e-5, rtol=0)
    torch.testing.assert_close(by_core.sigma_R, by_lanczos.sigma_R, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(30, 20), (400, 440)], ids=["full", "iterative"])
def test_the_residual_is_that_of_the_triplets(shape: tuple[int, int]) -> None:
    delta = matrix_of(*shape, [1.0, 0.7, 0.2, 0.1])
    factors = factorise(delta, 3)
    torch.testing.assert_close(factors.residual_R.double(), residual_of(factors, delta), atol=5e-7, rtol=0)


@pytest.mark.parametrize("shape", [(400, 440), (440, 400)], ids=str)
def test_the_residual_of_triplets_that_stopped_early_counts_both_sides(shape: tuple[int, int]) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    factors = factorise(delta, 4, tolerance=10.0)
    assert float(factors.residual_R.max()) > 1e-3
    torch.testing.assert_close(factors.residual_R.double(), residual_of(factors, delta), rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(30, 20), (400, 440)], ids=["full", "iterative"])
def test_a_residual_above_the_tolerance_is_an_error(shape: tuple[int, int]) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NotConvergedError, match=rf"the SVD of a \({shape[0]}, {shape[1]}\) delta"):
        factorise(delta, 4, tolerance=1e-9)


def test_a_delta_without_any_size_is_not_certified() -> None:
    with pytest.raises(NotConvergedError):
        factorise(torch.zeros(4, 3), 2)


def test_more_triplets_than_the_matrix_has_are_all_of_them() -> None:
    assert factorise(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), 16).sigma_R.shape == (3,)


@given(sizes, sizes, seeds)
def test_u_and_v_share_one_sign_and_the_largest_entry_of_u_is_positive(rows: int, columns: int, seed: int) -> None:
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    factors, negated = factorise(delta, 2), factorise(-delta, 2)
    top_R = factors.left_MR.gather(0, factors.left_MR.abs().argmax(0, keepdim=True))
    assert bool((top_R > 0).all())
    torch.testing.assert_close(dense(negated.low_rank()), -dense(factors.low_rank()), atol=1e-3, rtol=0)


def test_the_same_delta_gives_the_same_bits() -> None:
    delta = matrix_of(400, 440, SPECTRA["gap of 1.03"])
    first, again = factorise(delta, 4), factorise(delta.clone(), 4)
    assert torch.equal(first.left_MR, again.left_MR)
    assert torch.equal(first.right_RN, again.right_RN)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8), seeds)
def test_the_three_rank_one_shares_are_those_of_the_spectrum(spectrum: list[float], seed: int) -> None:
    shares = rank_one_shares(factorise(matrix_of(10, 12, spectrum, seed), 1))
    top, square = max(spectrum), sum(s * s for s in spectrum)
    assert shares["nuclear"] == pytest.approx(top / sum(spectrum), rel=1e-3)
    assert shares["frobenius"] == pytest.approx(top / square**0.5, rel=1e-3)
    assert shares["energy"] == pytest.approx(top**2 / square, rel=1e-3)


def test_the_share_of_a_rank_one_matrix_is_one_in_every_convention() -> None:
    delta = torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 4))
    assert rank_one_shares(factorise(delta, 2)) == pytest.approx({"nuclear": 1, "frobenius": 1, "energy": 1}, rel=1e-5)


def test_the_nuclear_share_is_left_out_where_the_spectrum_is_not_known() -> None:
    assert rank_one_shares(factorise(matrix_of(400, 440, SPECTRA["gap of 2"]), 2))["nuclear"] is None
