"""The objective against the article: its pseudocode, its closed-form gradients, and numbers worked out by hand."""

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.nn import functional as F

from pretrain.corinfomax import CorInfoMaxLoss, Terms, log_determinant, update_covariance


def embeddings(count: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two views, unit length, float64, leaves of the graph."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(2, count, dim, generator=generator, dtype=torch.float64)
    z1, z2 = F.normalize(raw, dim=2)
    return z1.requires_grad_(), z2.requires_grad_()


def pseudocode(batches: list[tuple[Tensor, Tensor]], lam: float, alpha: float, eps: float) -> Iterator[tuple]:
    """Thesis Appendix A.2, line by line, with the diagonal perturbation of Eq. (6)."""
    dim = batches[0][0].shape[1]
    eye = torch.eye(dim, dtype=torch.float64)
    R1, R2, R12 = eye, eye, torch.zeros_like(eye)
    mu1, mu2 = torch.zeros(2, dim, dtype=torch.float64)
    for z1, z2 in batches:
        N = len(z1)
        mu1 = lam * mu1.detach() + (1 - lam) * z1.mean(0)
        mu2 = lam * mu2.detach() + (1 - lam) * z2.mean(0)
        z1_hat, z2_hat = z1 - mu1, z2 - mu2
        R1 = lam * R1.detach() + (1 - lam) * (z1_hat.T @ z1_hat) / N
        R2 = lam * R2.detach() + (1 - lam) * (z2_hat.T @ z2_hat) / N
        R12 = lam * R12 + (1 - lam) * (z1_hat.T @ z2_hat).detach() / N  # Eq. (4.6)
        cor_loss = -(torch.logdet(R1 + eps * eye) + torch.logdet(R2 + eps * eye)) / dim
        loss = cor_loss + alpha * F.mse_loss(z1, z2)
        yield loss, torch.stack([mu1, mu2]), torch.stack([R1, R2]), R12, torch.autograd.grad(loss, (z1, z2))


@pytest.mark.parametrize(("lam", "alpha"), [(0.01, 250.0), (0.1, 2000.0)])
def test_equals_the_pseudocode_over_five_batches(lam: float, alpha: float) -> None:
    batches = [embeddings(48, 16, seed) for seed in range(5)]
    criterion = CorInfoMaxLoss(dim=16, attraction=alpha, forgetting=lam, eps=1e-8)
    for (z1, z2), (loss, mean, covariance, cross, gradients) in zip(
        batches, pseudocode(batches, lam, alpha, 1e-8), strict=True
    ):
        terms = criterion(z1, z2)
        own = torch.autograd.grad(terms.total, (z1, z2))
        torch.testing.assert_close(terms.total, loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(terms.total, terms.big_bang + alpha * terms.attraction, rtol=0, atol=0)
        torch.testing.assert_close(criterion.mean, mean.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(criterion.covariance, covariance.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(criterion.cross_covariance, cross, rtol=0, atol=1e-12)
        assert not criterion.cross_covariance.requires_grad
        torch.testing.assert_close(own, gradients, rtol=1e-12, atol=1e-12)


def test_numbers_by_hand() -> None:
    # P = 1, lambda = 1/2, from mean 0 and variance 1.
    # View 1 is (1, -1): mean 0, variance 1/2 + 1/2 x 1 = 1.
    # View 2 is (1, 1): mean 1/2, both deviate by 1/2, variance 1/2 + 1/2 x 1/4 = 5/8.
    criterion = CorInfoMaxLoss(dim=1, attraction=10.0, forgetting=0.5, eps=0.0)
    terms = criterion(torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0], [1.0]]))
    assert criterion.mean.flatten().tolist() == [0.0, 0.5]
    assert criterion.covariance.flatten().tolist() == [1.0, 0.625]
    assert terms.big_bang.item() == pytest.approx(-math.log(5 / 8), abs=1e-15)
    assert terms.attraction.item() == 2.0  # the mean of 0 and 4
    assert terms.total.item() == pytest.approx(20 - math.log(5 / 8), abs=1e-14)


def test_closed_form_gradient() -> None:
    # Appendix C.1. Its Eq. (A.1) holds the mean fixed and leaves out the factor 2 of d(z z^T); the pseudocode
    # differentiates through the updated mean, which adds -(1 - lambda) x (mean of the deviations) to each of them.
    lam, alpha, count = 0.1, 500.0, 40
    z1, z2 = embeddings(count, 8, 0)
    criterion = CorInfoMaxLoss(dim=8, attraction=alpha, forgetting=lam, eps=1e-8)
    gradient = torch.autograd.grad(criterion(z1, z2).total, z1)[0]
    inverse = torch.linalg.inv(criterion.covariance[0] + 1e-8 * torch.eye(8))
    deviation = z1 - criterion.mean[0]
    expansion = -2 * (1 - lam) / count / 8 * (deviation - (1 - lam) * deviation.mean(0)) @ inverse
    pull = alpha * 2 * (z1 - z2) / (count * 8)
    torch.testing.assert_close(gradient, expansion + pull, rtol=1e-12, atol=1e-14)


def test_order_of_the_batch_does_not_matter() -> None:
    z1, z2 = embeddings(32, 8, 1)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    values = [
        CorInfoMaxLoss(dim=8, attraction=1.0, forgetting=0.1, eps=1e-8)(*z) for z in ((z1, z2), (z1[order], z2[order]))
    ]
    torch.testing.assert_close(values[0], values[1], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["constant", "rank one", "fewer images than dimensions"])
def test_degenerate_embeddings_give_the_right_finite_loss(kind: str) -> None:
    z1, _ = embeddings(8, 32, 2)
    z = z1.detach()
    if kind == "constant":
        z = z[:1].repeat(8, 1)
    elif kind == "rank one":
        z = z[:1] * torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)[:, None]
    criterion = CorInfoMaxLoss(dim=32, attraction=1.0, forgetting=0.01, eps=1e-8)
    for _ in range(20):  # the identity at the start has decayed to 1e-40
        leaf = z.clone().requires_grad_()
        terms = criterion(leaf, leaf)
    eigenvalues = torch.linalg.eigvalsh(criterion.covariance).clamp(min=0) + 1e-8
    assert terms.big_bang.item() == pytest.approx(-eigenvalues.log().sum().item() / 32, rel=1e-6)
    assert torch.autograd.grad(terms.total, leaf)[0].isfinite().all()


def test_singular_covariance_is_not_a_number_and_neither_is_its_gradient() -> None:
    criterion = CorInfoMaxLoss(dim=4, attraction=1.0, forgetting=0.0, eps=0.0)
    z = (torch.ones(6, 4) / 2).requires_grad_()
    terms = criterion(z, z)
    assert terms.total.isnan()
    assert torch.autograd.grad(terms.total, z)[0].isnan().any()


def test_log_determinant_and_its_gradient() -> None:
    raw = torch.randn(3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positive = raw @ raw.mT + 0.1 * torch.eye(6)

    def symmetric(matrices: Tensor) -> Tensor:
        return log_determinant((matrices + matrices.mT) / 2)

    assert torch.autograd.gradcheck(symmetric, positive.requires_grad_())
    torch.testing.assert_close(log_determinant(positive), torch.linalg.slogdet(positive)[1], rtol=1e-12, atol=1e-12)


def test_log_determinant_of_a_perturbed_matrix() -> None:
    matrix = torch.diag(torch.tensor([0.5, 2.0], dtype=torch.float64)).requires_grad_()
    value = log_determinant(matrix, eps=0.5)
    assert value.item() == pytest.approx(math.log(1.0 * 2.5), abs=1e-15)
    torch.testing.assert_close(torch.autograd.grad(value, matrix)[0], torch.diag(torch.tensor([1, 0.4]).double()))
    assert matrix.diagonal().tolist() == [0.5, 2.0]  # not changed in place


def test_gradient_of_the_covariance_is_right_for_cotangents_that_are_not_symmetric() -> None:
    generator = torch.Generator().manual_seed(0)
    z, cotangent, old = (
        torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (4, 4), (4, 4))
    )
    z.requires_grad_()
    own = update_covariance(old, z, forgetting=0.1)
    torch.testing.assert_close(own, 0.1 * old + z.mT @ z, rtol=0, atol=1e-14)
    gradients = [torch.autograd.grad((matrix * cotangent).sum(), z)[0] for matrix in (own, z.mT @ z)]
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-13)


def test_a_second_derivative_is_refused() -> None:
    z1, z2 = embeddings(16, 8, 0)
    terms = CorInfoMaxLoss(dim=8, attraction=1.0, forgetting=0.1, eps=1e-8)(z1, z2)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(terms.total, z1, create_graph=True)


def test_autocast_changes_nothing() -> None:
    z1, z2 = (z.float() for z in embeddings(64, 16, 3))
    plain, under = (CorInfoMaxLoss(dim=16, attraction=2000.0, forgetting=0.1, eps=1e-8) for _ in range(2))
    expected = plain(z1, z2)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(under(z1, z2), expected, strict=True))
    assert torch.equal(under.covariance, plain.covariance)


@contextlib.contextmanager
def low_precision_matmuls() -> Iterator[None]:
    """TF32, or bfloat16 where a CPU multiplies it, for float32 matrices."""
    before, tf32 = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    try:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cuda.matmul.allow_tf32 = True
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.set_float32_matmul_precision(before)


def three_batches(
    criterion: Callable[[Tensor, Tensor], Terms], device: str, dtype: torch.dtype
) -> list[tuple[Tensor, ...]]:
    """Of each batch the loss, and its gradient with respect to both views."""
    found = []
    for seed in range(3):
        z = [view.detach().to(device, dtype).requires_grad_() for view in embeddings(96, 64, seed)]
        terms = criterion(*z)
        found.append((terms.total.detach(), *torch.autograd.grad(terms.total, z)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("around", ["autocast", "low precision", "compile"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_what_is_around_the_objective_changes_nothing_in_it(around: str, device: str) -> None:
    if around == "compile" and device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    plain, other = (CorInfoMaxLoss(dim=64, attraction=2000.0, forgetting=0.1, eps=1e-8).to(device) for _ in range(2))
    if around == "compile":  # in float64, where a change of order shows as 1e-16
        expected = three_batches(plain, device, torch.float64)
        found = three_batches(torch.compile(other), device, torch.float64)
    else:
        expected = three_batches(plain, device, torch.float32)
        with torch.autocast(device, torch.bfloat16) if around == "autocast" else low_precision_matmuls():
            found = three_batches(other, device, torch.float32)
    bound = 1e-12 if around == "compile" else 0
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
    torch.testing.assert_close(other.state_dict(), plain.state_dict(), rtol=bound, atol=bound)


def test_state_is_saved_kept_in_float64_and_left_alone_in_eval() -> None:
    criterion = CorInfoMaxLoss(dim=8, attraction=1.0, forgetting=0.1, eps=1e-8)
    criterion(*embeddings(16, 8, 4))
    before = criterion.covariance.clone()
    assert set(criterion.state_dict()) == {"mean", "covariance", "cross_covariance"}
    criterion.to(torch.bfloat16)
    assert torch.equal(criterion.covariance, before)
    state = {name: tensor.clone() for name, tensor in criterion.state_dict().items()}
    criterion.eval()
    criterion(*embeddings(16, 8, 5))
    assert all(torch.equal(tensor, state[name]) for name, tensor in criterion.state_dict().items())


@pytest.mark.parametrize("shapes", [((4, 8), (4, 7)), ((4, 7), (4, 7)), ((0, 8), (0, 8)), ((8,), (8,))])
def test_wrong_shapes_are_named(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    criterion = CorInfoMaxLoss(dim=8, attraction=1.0, forgetting=0.1, eps=1e-8)
    with pytest.raises(ValueError, match=r"expected two \(N, 8\)"):
        criterion(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def _share(rank: int, splits: list[int], port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(splits)
    )
    criterion = CorInfoMaxLoss(dim=8, attraction=250.0, forgetting=0.1, eps=1e-8)
    weight = torch.eye(8, dtype=torch.float64).requires_grad_()  # stands for the network
    for seed in range(2):
        z1, z2 = (z.detach().split(splits)[rank] for z in embeddings(sum(splits), 8, seed))
        terms = criterion(z1 @ weight, z2 @ weight)
    (gradient,) = torch.autograd.grad(terms.total, weight)
    torch.distributed.all_reduce(gradient)
    result = {
        "loss": terms.total.detach(),
        "gradient": gradient / len(splits),
        "covariance": criterion.covariance,
        "cross_covariance": criterion.cross_covariance,
    }
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("splits", [[12, 12], [5, 11, 8]], ids=["two equal shares", "three uneven shares"])
def test_processes_equal_one_with_the_whole_batch(splits: list[int], tmp_path, free_port: int) -> None:
    criterion = CorInfoMaxLoss(dim=8, attraction=250.0, forgetting=0.1, eps=1e-8)
    weight = torch.eye(8, dtype=torch.float64).requires_grad_()
    for seed in range(2):
        z1, z2 = (z.detach() for z in embeddings(24, 8, seed))
        terms = criterion(z1 @ weight, z2 @ weight)
    (gradient,) = torch.autograd.grad(terms.total, weight)
    multiprocessing.spawn(_share, (splits, free_port, str(tmp_path)), nprocs=len(splits))
    for rank in range(len(splits)):
        result = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(result["loss"], terms.total.detach(), rtol=1e-12, atol=1e-12)
        for name in ("covariance", "cross_covariance"):
            torch.testing.assert_close(result[name], getattr(criterion, name), rtol=0, atol=1e-12)
        # DistributedDataParallel averages over the processes, as `_share` does.
        torch.testing.assert_close(result["gradient"], gradient, rtol=1e-12, atol=1e-12)
