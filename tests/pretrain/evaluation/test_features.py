"""Features and neighbours: against brute force and votes counted by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from pretrain.evaluation import features
from pretrain.evaluation.features import Pipeline, accuracy, extract, knn_accuracy, nearest, vote
from pretrain.images.sources import ArraySource

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
    assert sharp[0].tolist() == pytest.approx([1.0, 2 * np.exp(-1.0), 0.0], abs=1e-6)
    flat = vote(similarity, neighbours, classes=3, temperature=1.0)
    assert flat[0].tolist() == pytest.approx([1.0, 2 * np.exp(-0.5), 0.0], abs=1e-6)


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
    monkeypatch.setattr(features, "TRAIN_CHUNK", chunk + 5)
    similarity, found = nearest(train, labels, test, k=9, device=CPU, chunk=chunk)
    assert torch.allclose(similarity, expected[:, :9], atol=1e-6)
    assert torch.equal(found, labels[index[:, :9]])


def test_more_neighbours_than_images_are_all_the_images() -> None:
    train, labels = torch.tensor([unit(0), unit(90)]), torch.tensor([1, 0])
    test = torch.tensor([unit(10), unit(80)])
    neighbours = nearest(train, labels, test, k=5, device=CPU)
    assert neighbours[0][:, 2:].eq(features.NO_NEIGHBOUR).all()
    scores = vote(*neighbours, classes=2, temperature=0.07)
    assert scores.isfinite().all()
    found = knn_accuracy(*neighbours, torch.tensor([1, 0]), ks=[1, 5], classes=2, temperature=0.07)
    assert found == {1: {"top1": 100.0, "top5": 100.0}, 5: {"top1": 100.0, "top5": 100.0}}


def test_accuracy_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.6, 0.3, 0.1], [0.2, 0.3, 0.5]])
    labels = torch.tensor([2, 0, 0])
    assert accuracy(scores, labels) == pytest.approx(100 / 3)
    assert accuracy(scores, labels, top=2) == pytest.approx(200 / 3)
    assert accuracy(scores, labels, top=5) == 100


class Mean(nn.Module):
    """The mean of each channel, and whether it was in training mode."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mode = torch.full((len(images), 1), float(self.training))
        return torch.cat([images.mean(dim=(2, 3)), mode], dim=1)


def test_extraction_keeps_the_order_and_the_mode() -> None:
    grey = np.arange(0, 250, 10, dtype=np.uint8)
    images = np.broadcast_to(grey[:, None, None, None], (25, 8, 8, 3)).copy()
    source = ArraySource(images, list(range(25)), [str(i) for i in range(25)])
    pipeline = Pipeline(8, torch.zeros(3), torch.ones(3), 0, CPU)
    encoder = Mean().train()
    indices = np.array([3, 20, 1, 7, 8])
    found, labels = extract(encoder, source, pipeline, precision="float32", indices=indices, batch_size=2)
    assert encoder.training
    assert labels.tolist() == indices.tolist()
    assert torch.allclose(found[:, 0], torch.from_numpy(grey[indices]).float() / 255, atol=1e-6)
    assert found[:, 3].eq(0).all()  # in eval mode
