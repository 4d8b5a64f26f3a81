"""A rendering small enough for tests, made once."""

import pytest

from shapes import Recipe, ensure_rendered

SMALL = Recipe(
    unlabeled=6,
    objects_train=2,
    objects_val=1,
    scenes_train=12,
    scenes_val=3,
    object_side=48,
    scene_sides=(80, 100),
)


@pytest.fixture(scope="session")
def small():
    return SMALL


@pytest.fixture(scope="session")
def rendered(tmp_path_factory, small):
    return ensure_rendered(tmp_path_factory.mktemp("shapes") / "a", processes=1, progress=False, recipe=small)
