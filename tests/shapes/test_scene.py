"""Pictures: what is in them, how much of it is seen, and that colour and texture do not say the class."""

import numpy as np
import pytest

from shapes import CLASSES
from shapes.render import generator
from shapes.scene import MIN_VISIBLE, compose


def _scene(index, names, size=(120, 100), scale=(0.14, 0.4)):
    return compose(generator(0, "scenes/train", index), size, names, scale=scale, clutter=4)


def test_the_picture_has_the_size_that_was_asked_for():
    scene = _scene(0, ["star"])
    assert scene.image.shape == (100, 120, 3)
    assert scene.image.dtype == np.uint8
    assert scene.objects[0].coverage.shape == (100, 120)


@pytest.mark.parametrize("name", CLASSES)
def test_one_object_is_always_placed(name):
    assert all([one.name for one in _scene(i, [name]).objects] == [name] for i in range(10))


def test_enough_of_every_object_is_seen_and_no_pixel_belongs_to_two():
    hidden = 0
    for index in range(30):
        objects = _scene(index, ["cross", "ellipse", "star", "heart"]).objects
        visible = [one.coverage.sum() / one.full_area for one in objects]
        assert min(visible) >= MIN_VISIBLE
        assert sum(one.coverage for one in objects).max() <= 1 + 1e-5
        hidden += sum(share < 0.9 for share in visible)
    assert hidden > 10, "there should be occlusion"


def test_an_object_can_be_told_from_what_surrounds_it():
    """Mean lightness differs inside and outside in grey: no colour jitter takes the shape away."""
    differences = []
    for index in range(40):
        scene = _scene(index, [CLASSES[index % len(CLASSES)]], size=(96, 96), scale=(0.34, 0.58))
        grey, inside = scene.image.mean(axis=2), scene.objects[0].coverage > 0.5
        differences.append(abs(grey[inside].mean() - grey[~inside].mean()))
    assert np.median(differences) > 20
    assert np.quantile(differences, 0.1) > 5


def test_colour_and_texture_do_not_predict_the_class():
    """Nearest neighbours by the object's own colours and edge strength are of the same class by chance only."""
    features, labels = [], []
    for index in range(400):
        label = index % len(CLASSES)
        scene = _scene(index, [CLASSES[label]], size=(48, 48), scale=(0.34, 0.58))
        inside = scene.image[scene.objects[0].coverage > 0.9].astype(np.float64)
        grey = scene.image.mean(axis=2)
        edges = np.histogram(np.abs(np.diff(grey, axis=1)), bins=8, range=(0, 64), density=True)[0] * 20
        colours = [np.histogram(inside[:, c], bins=8, range=(0, 255))[0] / len(inside) for c in range(3)]
        features.append(np.concatenate([*colours, edges]))
        labels.append(label)
    x, y = np.array(features), np.array(labels)
    distance = (x**2).sum(axis=1)[:, None] + (x**2).sum(axis=1)[None] - 2 * x @ x.T
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1)[:, :5]
    same = (y[nearest] == y[:, None]).mean()
    # Chance is 0.125; its standard deviation over 2000 pairs is 0.007.
    assert same < 0.125 + 0.03
