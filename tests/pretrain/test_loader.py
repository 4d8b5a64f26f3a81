"""Batches: the same images in a step for any number of processes, and after a resume."""

from collections.abc import Callable

import pytest

from cli.errors import UserError
from pretrain.loader import ShuffledBatches, check_batch, epoch_order


def steps(first: int = 0, last: int = 9, rank: int = 0, world: int = 1) -> list[list[tuple[int, int]]]:
    return list(
        ShuffledBatches(14, batch_size=4, seed=1, first_step=first, last_step=last, rank=rank, world_size=world)
    )


def test_an_epoch_visits_each_image_at_most_once_and_epochs_differ() -> None:
    batches = steps()
    assert [epoch for batch in batches for epoch, _ in batch] == [0] * 12 + [1] * 12 + [2] * 12
    for epoch in range(3):
        seen = [index for batch in batches[3 * epoch : 3 * epoch + 3] for _, index in batch]
        assert len(set(seen)) == 12
    assert batches[0] != [(0, index) for _, index in batches[3]]
    assert epoch_order(14, 1, 0).tolist() != epoch_order(14, 2, 0).tolist()


@pytest.mark.parametrize("first", [1, 3, 5, 9])
def test_a_resumed_run_takes_the_batches_that_were_left(first: int) -> None:
    assert steps(first) == steps()[first:]


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batch_of_one(world: int) -> None:
    shares = [steps(rank=rank, world=world) for rank in range(world)]
    assert [[item for share in step for item in share] for step in zip(*shares, strict=True)] == steps()


@pytest.mark.parametrize(("batch", "world", "word"), [(10, 4, "divisible"), (32, 1, "has 20 images")])
def test_impossible_batches_are_refused(batch: int, world: int, word: str, error_of: Callable) -> None:
    with pytest.raises(UserError, match=word):
        check_batch(20, batch, world)
