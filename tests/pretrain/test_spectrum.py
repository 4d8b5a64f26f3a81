"""What is read off the covariance: LDMI as the article defines it, effective rank, and the warning of a collapse."""

import math

import pytest
import torch
from torch import Tensor

from pretrain.spectrum import COLLAPSE_SHARE, effective_rank, is_collapsed, log_determinant_information, measure

EPS = 1e-8


def covariances(mixing: float, dim: int = 6, count: int = 400) -> tuple[Tensor, Tensor]:
    """Covariance (2, P, P) and cross-covariance of two samples, the second a share `mixing` of the first plus noise."""
    generator = torch.Generator().manual_seed(0)
    first, noise = torch.randn(2, count, dim, generator=generator, dtype=torch.float64)
    first = first @ torch.diag(torch.linspace(0.5, 2, dim, dtype=torch.float64))
    second = mixing * first + (1 - mixing) * noise
    first, second = (z - z.mean(0) for z in (first, second))
    return torch.stack([first.T @ first, second.T @ second]) / count, first.T @ second / count


def equation_one(covariance: Tensor, cross: Tensor, eps: float) -> Tensor:
    """Article Eq. (1), term by term."""
    rx, ry = covariance
    eye = torch.eye(len(rx), dtype=rx.dtype)

    def logdet(matrix: Tensor) -> Tensor:
        return torch.linalg.slogdet(matrix + eps * eye)[1]

    x_given_y = rx - cross @ torch.linalg.inv(ry + eps * eye) @ cross.T
    y_given_x = ry - cross.T @ torch.linalg.inv(rx + eps * eye) @ cross
    return (logdet(rx) + logdet(ry) - logdet(x_given_y) - logdet(y_given_x)) / 4


@pytest.mark.parametrize("mixing", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_ldmi_is_equation_one(mixing: float, eps: float) -> None:
    covariance, cross = covariances(mixing)
    torch.testing.assert_close(
        log_determinant_information(covariance, cross, eps),
        equation_one(covariance, cross, eps),
        rtol=1e-10,
        atol=1e-12,
    )


def test_ldmi_by_hand() -> None:
    # P = 1, unit variances, correlation 1/2: det J = 1 - 1/4, so I = -ln(3/4) / 2, Shannon's for two Gaussians.
    value = log_determinant_information(torch.ones(2, 1, 1).double(), torch.full((1, 1), 0.5).double(), 0.0)
    assert value.item() == pytest.approx(-math.log(0.75) / 2, abs=1e-15)


def test_ldmi_is_zero_without_correlation_grows_with_it_and_knows_no_order() -> None:
    values = [log_determinant_information(*covariances(mixing), EPS).item() for mixing in (0.2, 0.5, 0.9)]
    assert 0 < values[0] < values[1] < values[2]
    covariance, cross = covariances(0.5)
    assert log_determinant_information(covariance, 0 * cross, EPS).item() == pytest.approx(0, abs=1e-12)
    swapped = log_determinant_information(covariance.flip(0), cross.T, EPS)
    assert swapped.item() == pytest.approx(values[1], abs=1e-12)


def test_ldmi_of_equal_views_is_finite() -> None:
    covariance, cross = covariances(1.0)  # nothing is left of one view when the other is known: eps decides
    value = log_determinant_information(covariance, cross, EPS)
    expected = -torch.log(2 * EPS / (2 * torch.linalg.eigvalsh(covariance[0]))).sum() / 2 - 6 * math.log(2) / 2
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("eigenvalues", "rank"),
    [
        ([1.0, 1.0, 1.0, 1.0], 4.0),
        ([7.0, 0.0, 0.0, 0.0], 1.0),
        ([1.0, 1.0, 0.0, -1e-18], 2.0),
        ([0.5, 0.25, 0.25, 0.0], 2**1.5),  # entropy 3/2 bits
        ([0.0, 0.0, 0.0, 0.0], 0.0),
    ],
)
def test_effective_rank_by_hand(eigenvalues: list[float], rank: float) -> None:
    assert effective_rank(torch.tensor(eigenvalues, dtype=torch.float64)).item() == pytest.approx(rank, rel=1e-12)


@pytest.mark.parametrize(("used", "collapsed"), [(9, True), (11, False)])
def test_the_threshold_of_a_collapse(used: int, collapsed: bool) -> None:
    # 100 dimensions of which `used` are in use, equally: the effective rank is that number.
    assert COLLAPSE_SHARE == 0.1
    good = torch.eye(100, dtype=torch.float64) / 100
    bad = torch.diag(torch.tensor([1.0] * used + [0.0] * (100 - used), dtype=torch.float64)) / used
    spectrum = measure(torch.stack([good, bad]), torch.zeros(100, 100, dtype=torch.float64), EPS)
    assert spectrum.effective_rank == pytest.approx(used)
    assert spectrum.min_eigenvalue == pytest.approx(0, abs=1e-15)
    assert is_collapsed(spectrum) == collapsed
    assert spectrum.eigenvalues[1].tolist() == sorted(spectrum.eigenvalues[1].tolist(), reverse=True)
