"""Triplets are the SVD's, by whichever of the three ways; the certificate is true."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankleap.checkpoints import Delta, DeltaRows, LowRank, dense
from rankleap.errors import InputError, NotConvergedError, NotFiniteError
from rankleap.lowrank import Factors, Workspace, factorise, factorise_experts, rank_one_shares
from rankleap.lowrank.factors import FULL_SVD_SIDE, SEPARATED, TOLERANCE
from rankleap.lowrank.lanczos import lanczos

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
    assert float(residual_R.max()) < TOLERANCE
    torch.testing.assert_close(factors.residual_R.double(), residual_R, atol=2e-6, rtol=0)
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
    delta = matrix_of(*shape, [2.0**-i for i in range(min(shape))])
    with pytest.raises(NotConvergedError, match=rf"the SVD of a \({shape[0]}, {shape[1]}\) delta"):
        factorise(delta, 4, tolerance=1e-9)


@pytest.mark.parametrize("shape", [(4, 3), (400, 440)], ids=["full", "iterative"])
def test_a_delta_that_is_zero_has_no_triplets(shape: tuple[int, int]) -> None:
    factors = factorise(torch.zeros(shape), 2)
    assert factors.sigma_R.shape == (0,)
    assert factors.norm == 0
    assert dense(factors.low_rank()).shape == shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(4, 3), (400, 440)], ids=["full", "iterative"])
def test_a_delta_that_is_not_finite_is_named(shape: tuple[int, int], bad: float) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    delta[2, 1] = bad
    with pytest.raises(NotFiniteError, match="q_proj has NaN or infinity"):
        factorise(delta, 2, name="q_proj")


def in_noise(gap: float, shape: tuple[int, int] = (600, 420)) -> Tensor:
    """One direction in noise whose largest singular value it exceeds by ``gap``, rounded as two bf16 checkpoints would be."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    left, sigma, right = torch.linalg.svd(noise, full_matrices=False)
    sigma[0] = gap * sigma[1]
    base = 30 * torch.randn(shape, generator=generator)
    return (base + ((left * sigma) @ right).float()).bfloat16().float() - base.bfloat16().float()


@pytest.mark.parametrize("start", ["cold", "warm", "lost"])
@pytest.mark.parametrize("gap", [3, 1.2, 1.03, 1.003])
def test_at_every_gap_a_vector_is_right_or_flagged(gap: float, start: str) -> None:
    delta = in_noise(gap)
    left, sigma, right = torch.linalg.svd(delta.double(), full_matrices=False)
    generator = torch.Generator().manual_seed(1)
    # Lost: a start that is the second direction exactly, as after a sudden turn.
    starts = {
        "cold": None,
        "warm": right[0].float() + 0.01 * torch.randn(420, generator=generator),
        "lost": right[1].float(),
    }
    factors = factorise(delta, 1, start_N=starts[start])
    assert float(factors.residual_R[0]) <= TOLERANCE or not bool(factors.separated_R[0])
    assert float(factors.sigma_R[0]) == pytest.approx(float(sigma[0]), rel=1e-3)
    angle = max(
        float((v - (v @ t) * t).norm())
        for v, t in ((factors.right_RN[0].double(), right[0]), (factors.left_MR[:, 0].double(), left[:, 0]))
    )
    if bool(factors.separated_R[0]):
        assert angle < SEPARATED
        assert angle <= float(factors.angle_R[0]) + 1e-6
    if gap >= 1.03:  # rounding alone closes the smallest gap
        assert bool(factors.separated_R[0])


def test_equal_singular_values_are_all_found_and_flagged() -> None:
    factors = factorise(matrix_of(400, 440, [1.0, 1.0, *[0.3 * 0.99**i for i in range(398)]]), 3)
    torch.testing.assert_close(factors.sigma_R, torch.tensor([1.0, 1.0, 0.3]), atol=1e-4, rtol=0)
    assert factors.separated_R.tolist()[:2] == [False, False]


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["from the files at every pass", "kept in memory"])
def test_row_blocks_give_the_factors_of_the_whole(limit: int) -> None:
    delta = matrix_of(400, 440, SPECTRA["gap of 1.03"])
    read = 0

    def rows(expert: int | None, out: Tensor | None) -> Iterator[Tensor]:
        nonlocal read
        read += 1
        for block in delta.split(64):
            top = block.storage_offset() // 440
            yield block if out is None else out[top : top + len(block)].copy_(block)

    lazy = factorise(DeltaRows(delta.shape, rows), 2, workspace=Workspace(limit))
    whole = factorise(delta, 2)
    torch.testing.assert_close(lazy.left_MR, whole.left_MR, atol=1e-4, rtol=0)
    torch.testing.assert_close(lazy.sigma_R, whole.sigma_R, rtol=1e-5, atol=0)
    assert (read == 1) == (limit > 0)


def test_a_device_that_is_not_here_is_refused_before_any_work() -> None:
    with pytest.raises(InputError, match="device 'nonsense' cannot be used here"):
        factorise(torch.ones(2, 2), 1, workspace=Workspace(device="nonsense"))


def test_a_start_near_the_answer_takes_fewer_passes() -> None:
    delta = in_noise(1.2)
    passes = []

    def counted() -> list[Tensor]:
        passes.append(1)
        return list(delta.split(50))

    cold = lanczos(counted, (600, 420), 1, TOLERANCE)
    count = len(passes)
    warm = lanczos(counted, (600, 420), 1, TOLERANCE, cold.right_RN[0])
    assert cold.passes == count
    assert len(passes) - count == warm.passes < 0.7 * count


def test_fused_experts_are_factored_each_on_its_own() -> None:
    delta_EMN = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0))
    delta_EMN[1] = 0
    experts = factorise_experts(delta_EMN, 2)
    for matrix, factors in zip(delta_EMN, experts, strict=True):
        torch.testing.assert_close(dense(factors.low_rank()), dense(factorise(matrix, 2).low_rank()))
    assert len(experts[1].sigma_R) == 0


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
