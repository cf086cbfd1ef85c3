"""One identity per triplet over time: random signs and swaps are undone, u and v together."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankleap.trajectory import AlignedFactors, align

Triplets = tuple[Tensor, Tensor, Tensor]
seeds = st.integers(0, 2**31)
M, R, N = 12, 3, 10


def smooth_path(steps: int, seed: int) -> list[Triplets]:
    """Triplets that turn a little from step to step, and whose σ cross each other."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(M, R, generator=generator), torch.randn(N, R, generator=generator)
    path = []
    for step in range(steps):
        left = torch.linalg.qr(left + 0.1 * torch.randn(M, R, generator=generator))[0]
        right = torch.linalg.qr(right + 0.1 * torch.randn(N, R, generator=generator))[0]
        if path:  # QR has signs of its own
            left, right = left * sign_of(path[-1][0], left), right * sign_of(path[-1][2].T, right)
        sigma = torch.tensor([1.0 + step, 2.0, 1.5 + 0.7 * step])
        path.append((left, sigma, right.T.contiguous()))
    return path


def sign_of(before: Tensor, now: Tensor) -> Tensor:
    return torch.sign((before * now).sum(0))


def scrambled(path: list[Triplets], seed: int) -> list[Triplets]:
    """As an SVD gives them: any joint sign, any order."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for left, sigma, right in path:
        order = torch.randperm(R, generator=generator)
        sign = torch.where(torch.rand(R, generator=generator) < 0.5, -1.0, 1.0)
        found.append((left[:, order] * sign, sigma[order], right[order] * sign[:, None]))
    return found


@given(st.integers(2, 8), seeds, seeds)
def test_random_signs_and_swaps_are_undone(steps: int, seed: int, scramble: int) -> None:
    path = smooth_path(steps, seed)
    mixed = scrambled(path, scramble)
    aligned, straight = align([*mixed[:-1], path[-1]]), align(path)
    for left, right in zip(fields(aligned), fields(straight), strict=True):
        torch.testing.assert_close(left, right)
    for step, (left, sigma, right) in enumerate(path):
        torch.testing.assert_close(aligned.left_TMR[step], left)
        torch.testing.assert_close(aligned.sigma_TR[step], sigma)
        torch.testing.assert_close(aligned.right_TRN[step], right)
    assert not aligned.ambiguous_TR.any()


@given(st.integers(2, 6), seeds, seeds)
def test_u_and_v_flip_together_so_the_matrix_never_changes(steps: int, seed: int, scramble: int) -> None:
    mixed = scrambled(smooth_path(steps, seed), scramble)
    aligned = align(mixed)
    for step, (left, sigma, right) in enumerate(mixed):
        rebuilt = (aligned.left_TMR[step] * aligned.sigma_TR[step]) @ aligned.right_TRN[step]
        torch.testing.assert_close(rebuilt, (left * sigma) @ right)


def test_the_last_step_is_the_reference() -> None:
    mixed = scrambled(smooth_path(4, 0), 1)
    aligned = align(mixed)
    assert torch.equal(aligned.left_TMR[-1], mixed[-1][0])
    assert aligned.cosine_TR[-1].tolist() == [1.0] * R


def one(left: list[float], right: list[float]) -> Triplets:
    return torch.tensor([left]).T, torch.ones(1), torch.tensor([right])


def test_an_identity_that_cannot_be_told_is_flagged() -> None:
    here = one([1.0, 0.0], [1.0, 0.0])
    for other in (
        one([0.0, 1.0], [0.0, 1.0]),  # turned away on both sides
        one([0.0, 1.0], [1.0, 0.0]),  # u is orthogonal
        one([1.0, 0.0], [0.0, 1.0]),  # v is orthogonal
        one([-1.0, 0.0], [1.0, 0.0]),  # turned round on one side alone: no joint sign helps
    ):
        assert align([other, here]).ambiguous_TR.tolist() == [[True], [False]]
    for same in (here, one([-1.0, 0.0], [-1.0, 0.0]), one([0.8, 0.6], [0.8, 0.6])):
        assert align([same, here]).ambiguous_TR.tolist() == [[False], [False]]


def test_the_cosine_is_that_of_the_pair() -> None:
    aligned = align([one([-0.8, 0.6], [-0.6, 0.8]), one([1.0, 0.0], [1.0, 0.0])])
    torch.testing.assert_close(aligned.cosine_TR[0], torch.tensor([0.48**0.5]))
    torch.testing.assert_close(aligned.left_TMR[0, :, 0], torch.tensor([0.8, -0.6]))


def test_a_single_step_is_aligned_with_itself() -> None:
    (only,) = smooth_path(1, 0)
    assert torch.equal(align([only]).left_TMR[0], only[0])


def fields(aligned: AlignedFactors) -> tuple[Tensor, ...]:
    return aligned.left_TMR, aligned.sigma_TR, aligned.right_TRN, aligned.cosine_TR
