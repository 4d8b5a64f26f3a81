"""Errors by kind: scenes worked out by hand, one for each kind, and what must hold in every scene."""

import numpy as np
import pytest

from detection.evaluation import errors
from detection.evaluation.errors import ERRORS, Outcome, classify

NOTHING = dict.fromkeys((error.name.lower() for error in ERRORS), 0.0)
CAT, DOG = 0, 1


def scene(ious, classes, objects, crowd=()):
    """Detections in falling order of score (0.9, 0.8, ..) and their ious with each object."""
    return classify(
        np.array(ious, float).reshape(len(classes), len(objects)),
        np.arange(0.9, 0.9 - 0.1 * len(classes) + 0.05, -0.1)[: len(classes)],
        np.array(classes, int),
        np.array(objects, int),
        np.array([place in crowd for place in range(len(objects))], bool),
    )


def names(outcomes):
    return [Outcome(each).name.lower() for each in outcomes.outcomes]


def gains(outcomes):
    return {name: round(value, 6) for name, value in errors.gains(outcomes, classes=2).items()}


def test_perfect_detections_have_no_errors():
    outcomes = scene([[0.9, 0], [0, 0.8]], [CAT, DOG], [CAT, DOG])
    assert names(outcomes) == ["correct", "correct"]
    assert gains(outcomes) == NOTHING
    assert errors.corrected_ap50(outcomes, 2, ()) == 1
    assert errors.counts(outcomes) == {
        "detections": 2, "objects": 2, "correct": 2, "ignored": 0, "classification": 0, "localisation": 0, "both": 0,
        "duplicate": 0, "background": 0, "missed": 0,
    }  # fmt: skip


# AP50 of a class with one object is 1 if it is found by the first detection, 1/2 if by the second.
@pytest.mark.parametrize(
    ("ious", "classes", "objects", "expected", "gain"),
    [
        # The class is wrong: the cat is not found, AP50 0; with the right class it is 1. There are no dogs to average.
        ([0.7], [DOG], [CAT], ["classification"], {"classification": 100}),
        # Too little iou, of which more would make AP50 1.
        ([0.3], [CAT], [CAT], ["localisation"], {"localisation": 100}),
        # Neither: a dog's box that touches the cat, and the dog is found second, for 1/2, which costs the mean 25.
        (
            [[0.3, 0], [0, 0.8], [0.9, 0]], [DOG, DOG, CAT], [CAT, DOG], ["both", "correct", "correct"],
            {"both": 25},
        ),
        # The higher-scoring of two boxes on one cat finds it; a second cat is found third: precision 1 to a recall of
        # 1/2 (51 of the 101 recalls), then 2/3; without the duplicate 1.
        (
            [[0.9, 0], [0.6, 0], [0, 0.8]], [CAT] * 3, [CAT, CAT], ["correct", "duplicate", "correct"],
            {"duplicate": 100 * (50 / 101) / 3},
        ),
        # Nothing is there: the cat is found second.
        ([[0.05], [0.8]], [CAT, CAT], [CAT], ["background", "correct"], {"background": 50}),
        # One of two cats is seen: precision 1 up to a recall of 1/2, 51 of 101. The other one not counted, 1.
        ([[0.8, 0]], [CAT], [CAT, CAT], ["correct"], {"missed": 100 * 50 / 101}),
    ],
)  # fmt: skip
def test_each_kind_by_hand(ious, classes, objects, expected, gain):
    outcomes = scene(ious, classes, objects)
    assert names(outcomes) == expected
    assert gains(outcomes) == {**NOTHING, **{name: pytest.approx(value) for name, value in gain.items()}}
    assert errors.corrected_ap50(outcomes, 2, ERRORS) == 1


@pytest.mark.parametrize(
    ("iou", "own", "other"),
    [
        (0.09, "background", "background"), (0.1, "localisation", "both"), (0.49, "localisation", "both"),
        (0.5, "correct", "classification"),
    ],
)  # fmt: skip
def test_the_bounds_of_overlap(iou, own, other):
    assert names(scene([iou], [CAT], [CAT])) == [own]
    assert names(scene([iou], [DOG], [CAT])) == [other]


def test_the_first_kind_that_fits():
    # A dog's box: localisation before classification, classification before duplicate.
    assert names(scene([[0.3, 0.6]], [DOG], [DOG, CAT])) == ["localisation"]
    assert names(scene([[0.9, 0], [0.6, 0.6]], [DOG, DOG], [DOG, CAT])) == ["correct", "classification"]
    # Nearest to its own class, though it ious the other more.
    assert names(scene([[0.2, 0.4]], [DOG], [DOG, CAT])) == ["localisation"]


def test_only_the_highest_scoring_of_several_that_would_find_an_object_does():
    # Two bad boxes before a second cat that is found: put right, the first finds the first cat and the second vanishes.
    outcomes = scene([[0.4, 0], [0.3, 0], [0, 0.9]], [CAT] * 3, [CAT, CAT])
    assert names(outcomes) == ["localisation", "localisation", "correct"]
    # Now: one of two, found third, 1/3 up to a recall of 1/2.
    assert errors.corrected_ap50(outcomes, 2, ()) == pytest.approx(51 / 101 / 3)
    assert errors.corrected_ap50(outcomes, 2, [Outcome.LOCALISATION]) == 1
    # A box in the wrong place about an object that another found vanishes.
    outcomes = scene([[0.4], [0.9]], [CAT] * 2, [CAT])
    assert gains(outcomes) == {**NOTHING, "localisation": 50}


def test_an_object_that_a_correction_would_find_is_not_missed():
    outcomes = scene([[0.4, 0, 0]], [CAT], [CAT, DOG, DOG])
    assert errors.counts(outcomes)["missed"] == 2
    assert gains(outcomes) == {**NOTHING, "localisation": 50, "missed": 50}  # points of the mean over two classes


def test_crowds_count_neither_way():
    # The second lies in a crowd of cats, the third, a dog's box, does not find a dog there.
    outcomes = scene([[0.9, 0], [0.4, 0.95], [0, 0.95]], [CAT, CAT, DOG], [CAT, CAT], crowd=[1])
    assert names(outcomes) == ["correct", "ignored", "background"]
    assert errors.counts(outcomes)["objects"] == 1
    assert errors.corrected_ap50(outcomes, 2, ()) == 1


def test_where_not_all_objects_are_annotated_no_detection_is_false():
    ious, scores = np.array([[0.8], [0.7], [0.3], [0.0]]), np.array([0.9, 0.8, 0.7, 0.6])
    cats, alone = np.full(4, CAT), np.zeros(1, bool)
    outcomes = classify(ious, scores, cats, np.array([CAT]), alone, exhaustive=np.array([False, False, True, False]))
    assert names(outcomes) == ["correct", "ignored", "localisation", "ignored"]


def test_matching_takes_the_highest_scoring_first_and_the_nearest_left():
    assert errors.match(np.array([[0.6, 0.7], [0.55, 0.9], [0.5, 0.1]])).tolist() == [1, 0, -1]
    assert errors.match(np.array([[0.6, 0.6]])).tolist() == [1]  # of equals the last, as in pycocotools
    assert errors.match(np.zeros((2, 0))).tolist() == [-1, -1]


def test_joined_images_keep_their_objects_apart():
    first, second = scene([[0.9], [0.3]], [CAT, CAT], [CAT]), scene([[0, 0.3], [0, 0]], [DOG, DOG], [CAT, DOG])
    outcomes = errors.join([first, second, scene([], [], []), scene([], [], [CAT])])
    assert outcomes.targets.tolist() == [-1, 0, 2, -1]
    assert outcomes.matched.tolist() == [True, False, False, False]
    assert outcomes.missed.tolist() == [False, True, False, True]


@pytest.mark.parametrize("seed", range(5))
def test_no_correction_does_harm_and_all_together_leave_nothing(seed):
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(6):
        detections, objects = rng.integers(0, 12), rng.integers(0, 5)
        ious = rng.choice([0, 0.05, 0.2, 0.45, 0.55, 0.8], (detections, objects), p=[0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
        scores = np.sort(rng.random(detections))[::-1]
        classes, truth = rng.integers(0, 3, detections), rng.integers(0, 3, objects)
        images.append(classify(ious, scores, classes, truth, rng.random(objects) < 0.2))
    outcomes = errors.join(images)
    assert min(errors.gains(outcomes, 3).values()) > -1e-9
    assert errors.corrected_ap50(outcomes, 3, ERRORS) == 1
    numbers = errors.counts(outcomes)
    named = ("correct", "ignored", "classification", "localisation", "both", "duplicate", "background")
    assert numbers["detections"] == sum(numbers[name] for name in named)
    assert outcomes.matched.sum() == numbers["correct"]


def test_average_precision_by_hand():
    # Two of three found, with precision 1 and 2/3: 34 recalls up to 1/3, then 33 up to 2/3, then 34 of nothing.
    expected = [1.0] * 34 + [2 / 3] * 33 + [0.0] * 34
    assert errors.interpolated_precision(np.array([True, False, True]), 3).tolist() == pytest.approx(expected)
    assert errors.average_precision(np.array([], bool), 3) == 0
    # Nothing left to find: all is well unless something is detected.
    assert errors.average_precision(np.array([], bool), 0) == 1
    assert errors.average_precision(np.array([False]), 0) == 0


def test_curves_are_averaged_over_classes_that_have_objects():
    precision = np.full((10, 101, 3), -1.0)
    precision[:, :, 0], precision[:, :, 2] = 0.2, 0.6
    precision[5, :, 2] = 0.4
    curves = errors.precision_recall_curves(precision, np.linspace(0.5, 0.95, 10))
    assert curves["recall"][::50] == [0, 0.5, 1]
    assert (curves["0.5"][7], curves["0.75"][7], curves["mean"][7]) == pytest.approx((0.4, 0.3, 0.39))
