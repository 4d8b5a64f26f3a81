"""Batches: the same images in a step for any number of processes, and after a resume; the order in windows of tars."""

import itertools
from collections.abc import Callable

import pytest

from foundation.errors import UserError
from pretrain.batches.sampler import ShuffledBatches, batches_per_epoch, check_batch, epoch_order


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


def test_the_incomplete_last_batch_is_taken_where_asked_for() -> None:
    def epoch(count: int, rank: int = 0, world: int = 1) -> list[list[int]]:
        place = {"rank": rank, "world_size": world, "first_step": 0, "last_step": batches_per_epoch(count, 4, False)}
        batches = ShuffledBatches(count, batch_size=4, seed=1, drop_last=False, **place)
        return [[index for _, index in batch] for batch in batches]

    whole = epoch(11)
    assert [len(batch) for batch in whole] == [4, 4, 3]
    assert sorted(itertools.chain(*whole)) == list(range(11))
    assert [len(batch) for batch in epoch(9)] == [4, 4]  # BatchNorm cannot normalise a single image
    # Two processes take as many steps as one. Of the three images that are left one repeats, so that each has two.
    halves = [epoch(11, rank, 2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)][:2] == whole[:2]
    assert halves[0][2] + halves[1][2] == [*whole[2], whole[2][0]]


def test_windows_hold_the_images_of_some_tars_and_each_tar_is_in_one() -> None:
    pairs = []
    for epoch in range(3):
        order = epoch_order(24, 1, epoch, [4] * 6, window=2)
        blocks = [block.tolist() for block in order.reshape(3, 8)]
        tars = [sorted({image // 4 for image in block}) for block in blocks]
        assert sorted(order.tolist()) == list(range(24))
        assert [len(pair) for pair in tars] == [2, 2, 2]
        # Mixed, and not one tar after the other.
        assert all(len({image // 4 for image in block[:4]}) == 2 for block in blocks)
        pairs.append(tars)
    assert pairs[0] != pairs[1] != pairs[2]


def test_tars_of_uneven_and_of_no_size() -> None:
    tar_of = [0] * 3 + [2] * 5 + [3] * 2 + [4] * 4
    order = epoch_order(14, 1, 0, [3, 0, 5, 2, 4], window=1).tolist()
    visits = [tar_of[image] for image in order]
    assert sorted(order) == list(range(14))
    assert sum(1 for one, two in itertools.pairwise(visits) if one != two) == 3  # each is read through
    assert order != sorted(order)


@pytest.mark.parametrize("window", [0, 6, 100])
def test_without_windows_the_order_is_that_of_a_folder(window: int) -> None:
    assert epoch_order(24, 1, 2, [4] * 6, window).tolist() == epoch_order(24, 1, 2).tolist()


def test_windows_are_resumed_and_shared_among_processes() -> None:
    def steps(first: int, rank: int = 0, world: int = 1) -> list[list[tuple[int, int]]]:
        return list(
            ShuffledBatches(
                26,
                batch_size=4,
                seed=1,
                first_step=first,
                last_step=12,
                rank=rank,
                world_size=world,
                shards=[4] * 5 + [6],
                window=2,
            )
        )

    assert steps(4) == steps(0)[4:]
    assert [one + two for one, two in zip(steps(0, 0, 2), steps(0, 1, 2), strict=True)] == steps(0)


@pytest.mark.parametrize(
    ("batch", "world", "word"),
    [
        (10, 4, "divisible"),
        (32, 1, "has 20 images: set TRAIN.BATCH_SIZE 20 or lower$"),
        (32, 8, "set TRAIN.BATCH_SIZE 16 or lower, in multiples of the 8 processes$"),
        (32, 32, "use at most 20 processes$"),
    ],
)
def test_impossible_batches_are_refused(batch: int, world: int, word: str, error_of: Callable) -> None:
    with pytest.raises(UserError, match=word):
        check_batch(20, batch, world)
