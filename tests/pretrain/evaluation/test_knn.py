"""Neighbours and accuracy: against brute force, and votes counted by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from pretrain.evaluation import knn
from pretrain.evaluation.knn import NO_NEIGHBOUR, accuracies, accuracy, knn_accuracy, nearest, vote

CPU = torch.device("cpu")


def unit(degrees: float) -> list[float]:
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


def test_votes_counted_by_hand() -> None:
    # Neighbours at 0, 60 and 60 degrees: cosines 1, 0.5, 0.5. At temperature 0.5 their votes, relative to the first's,
    # are 1, exp(-1), exp(-1): the near one outvotes the others together (0.736). At temperature 1 it does not (1.213).
    train = torch.tensor([unit(0), unit(60), unit(-60), unit(180)])
    labels = torch.tensor([0, 1, 1, 2])
    similarity, neighbours = nearest(train, labels, torch.tensor([unit(0)]), k=3, device=CPU)
    assert similarity[0].tolist() == pytest.approx([1.0, 0.5, 0.5], abs=1e-6)
    assert neighbours.tolist() == [[0, 1, 1]]
    sharp = vote(similarity, neighbours, classes=3, temperature=0.5)
    assert sharp[0].tolist() == pytest.approx([1.0, 2 * np.exp(-1.0), -np.inf], abs=1e-6)
    flat = vote(similarity, neighbours, classes=3, temperature=1.0)
    assert flat[0].tolist() == pytest.approx([1.0, 2 * np.exp(-0.5), -np.inf], abs=1e-6)


def test_length_of_features_does_not_matter() -> None:
    train, test = torch.randn(20, 5), torch.randn(6, 5)
    labels = torch.arange(20)
    near = nearest(train, labels, test, k=4, device=CPU)[1]
    assert torch.equal(near, nearest(train * torch.rand(20, 1), labels, 7 * test, k=4, device=CPU)[1])


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(50, 8, generator=generator), torch.randn(23, 8, generator=generator)
    labels = torch.randint(0, 5, (50,), generator=generator)
    cosine = nn.functional.cosine_similarity(test[:, None], train[None], dim=2)
    expected, index = cosine.sort(dim=1, descending=True)
    monkeypatch.setattr(knn, "TRAIN_CHUNK", chunk + 5)
    similarity, found = nearest(train, labels, test, k=9, device=CPU, chunk=chunk)
    assert torch.allclose(similarity, expected[:, :9], atol=1e-6)
    assert torch.equal(found, labels[index[:, :9]])


def test_more_neighbours_than_images_are_all_the_images() -> None:
    train, labels = torch.tensor([unit(0), unit(90)]), torch.tensor([1, 0])
    test = torch.tensor([unit(10), unit(80)])
    neighbours = nearest(train, labels, test, k=5, device=CPU)
    assert neighbours[0][:, 2:].eq(NO_NEIGHBOUR).all()
    scores = vote(*neighbours, classes=3, temperature=0.07)
    assert scores[:, :2].isfinite().all()
    assert scores[:, 2].eq(-torch.inf).all()
    found = knn_accuracy(*neighbours, torch.tensor([1, 0]), ks=[1, 5], classes=2, temperature=0.07)
    assert found == {1: {"top1": 100.0}, 5: {"top1": 100.0}}


def test_a_class_without_a_vote_is_not_among_the_top_five() -> None:
    # One neighbour, of class 7: the other eleven classes have no vote, whatever their order.
    similarity, neighbours = torch.tensor([[0.9]] * 12), torch.full((12, 1), 7)
    found = knn_accuracy(similarity, neighbours, torch.arange(12), ks=[1], classes=12, temperature=0.07)
    assert found[1] == {"top1": pytest.approx(100 / 12), "top5": pytest.approx(100 / 12)}


def test_top_five_of_few_classes_is_left_out() -> None:
    assert accuracies(torch.zeros(1, 9), torch.tensor([3])).keys() == {"top1"}
    assert accuracies(torch.zeros(1, 10), torch.tensor([3])).keys() == {"top1", "top5"}


def test_a_diverged_head_is_right_about_nothing() -> None:
    assert accuracy(torch.full((4, 3), torch.nan), torch.tensor([0, 1, 2, 0]), top=3) == 0


def test_accuracy_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.6, 0.3, 0.1], [0.2, 0.3, 0.5]])
    labels = torch.tensor([2, 0, 0])
    assert accuracy(scores, labels) == pytest.approx(100 / 3)
    assert accuracy(scores, labels, top=2) == pytest.approx(200 / 3)
    assert accuracy(scores, labels, top=5) == 100
