"""Score thresholds and confusions, worked out by hand."""

import json

import numpy as np
import pytest

pytest.importorskip("detectron2")

from detection.evaluation import analysis, errors
from detection.evaluation.operating_points import Compared, confusion, read_thresholds, thresholds
from foundation.errors import UserError

NAMES = ["cat", "dog"]


def image(ious, scores, classes, objects, crowd=()):
    crowd = np.array(crowd, bool) if len(crowd) else np.zeros(len(objects), bool)
    ious = np.array(ious, float).reshape(len(scores), len(objects))
    return Compared(ious, np.array(scores), np.array(classes, int), np.array(objects, int), crowd)


# Two cats and a dog. By falling score: a cat found; a dog where the other cat is; a cat on nothing; the dog found.
SCENE = image([[0.9, 0, 0], [0, 0.8, 0], [0, 0, 0.05], [0, 0, 0.6]], [0.9, 0.8, 0.7, 0.30004], [0, 1, 0, 1], [0, 0, 1])


def outcomes(*images):
    return errors.join(errors.classify(*each) for each in images)


def test_the_best_threshold_by_hand():
    """At 0.9: 1 of 1 correct, F1 2/4. At 0.8: 2/5. At 0.7: 2/6. At 0.3: 2 of 4 correct, F1 4/7."""
    found = thresholds(outcomes(SCENE), NAMES)
    assert found["best"] == {"score": 0.3, "precision": 0.5, "recall": pytest.approx(2 / 3, abs=1e-6), "f1": 0.571429}
    cat, dog = found["classes"]
    assert cat == {"name": "cat", "score": 0.9, "precision": 1.0, "recall": 0.5, "f1": 0.666667}  # at 0.7: 2/4
    assert dog == {"name": "dog", "score": 0.3, "precision": 0.5, "recall": 1.0, "f1": 0.666667}
    curve = {key: np.array(values, float) for key, values in found["curve"].items()}
    at = {level: int(np.argmin(abs(curve["score"] - level))) for level in (0.0, 0.75, 0.95)}
    assert [curve["precision"][place] for place in at.values()][:2] == [0.5, 0.5]
    assert found["curve"]["precision"][at[0.95]] is None  # nothing is detected
    np.testing.assert_allclose([curve["recall"][place] for place in at.values()], [2 / 3, 1 / 3, 0], atol=1e-6)
    np.testing.assert_allclose([curve["f1"][place] for place in at.values()], [4 / 7, 2 / 5, 0], atol=1e-6)


def test_the_curve_passes_near_the_best_threshold_of_low_scores():
    """An object found with a score of 0.0852: a grid of hundredths has an F1 of 0.5 at 0.08, and of 0 at 0.09."""
    scene = image([[0.9], [0.0]], [0.0852, 0.0811], [0, 0], [0])
    found = thresholds(outcomes(scene), NAMES)
    assert (found["best"]["score"], found["best"]["f1"]) == (0.0852, 1.0)
    assert max(found["curve"]["f1"]) == 1.0


def test_the_scores_of_the_curve_are_those_that_the_format_describes():
    first, second, *_, last = thresholds(outcomes(SCENE), NAMES)["curve"]["score"]
    assert f'"curve": {{"score": [{first}, {second}, .., {last}]' in analysis.__doc__


def test_no_other_threshold_has_a_higher_f1():
    rng = np.random.default_rng(0)
    scenes = []
    for _ in range(30):
        scores = np.sort(rng.random(12))[::-1].round(2)  # with equal ones
        scenes.append(image(rng.random((12, 5)) ** 3, scores, rng.integers(0, 2, 12), rng.integers(0, 2, 5)))
    joined = outcomes(*scenes)
    best = thresholds(joined, NAMES)["best"]
    counted = joined.outcomes != errors.Outcome.IGNORED
    for level in np.linspace(0, 1, 401):
        kept = counted & (joined.scores >= level)
        correct = int((joined.outcomes[kept] == errors.Outcome.CORRECT).sum())
        assert 2 * correct / (kept.sum() + len(joined.object_classes)) <= best["f1"] + 1e-6


def test_nothing_correct_has_no_threshold():
    wrong = image([[0.1]], [0.5], [0], [0])
    none = dict.fromkeys(("score", "precision", "recall", "f1"))
    for scene in (wrong, image([], [], [], [0]), image([], [], [], [])):
        found = thresholds(outcomes(scene), NAMES)
        assert found["best"] is None
        assert found["classes"] == [{"name": name, **none} for name in NAMES]
        assert len(found["curve"]["f1"]) == 1001


def test_confusions_by_hand():
    """Above 0.5: a cat found, a cat taken for a dog, a cat on nothing, the dog missed."""
    found = confusion([SCENE], NAMES, 0.5)
    assert found["names"] == ["cat", "dog", "background"]
    assert found["counts"] == [[1, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert confusion([SCENE, SCENE], NAMES, 0.0)["counts"] == [[2, 2, 0], [0, 2, 0], [2, 0, 0]]
    assert confusion([SCENE], [str(number) for number in range(101)], 0.5) is None


def test_a_detection_of_the_right_class_comes_first_and_crowds_count_neither_way():
    """The dog that scores higher does not take the cat, which a cat is on; what lies in a crowd is left out."""
    twice = image([[0.9], [0.8]], [0.9, 0.6], [1, 0], [0])
    assert confusion([twice], NAMES, 0.5)["counts"] == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]
    crowd = image([[0.9], [0.9]], [0.9, 0.8], [0, 1], [0], crowd=[True])
    assert confusion([crowd], NAMES, 0.5)["counts"] == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_thresholds_are_read_back(tmp_path):
    with pytest.raises(UserError, match=r"there is no .*analysis\.json.*--eval-only"):
        read_thresholds(tmp_path)
    path = tmp_path / "analysis.json"
    path.write_text(json.dumps({"bbox": {"thresholds": thresholds(outcomes(SCENE), [*NAMES, "none"])}}))
    assert read_thresholds(tmp_path) == (0.3, {"cat": 0.9, "dog": 0.3})
    path.write_text('{"bbox": {"thresholds": {"best": null, "classes": []}}}')
    with pytest.raises(UserError, match=r"analysis\.json no detection of the evaluation is correct.* as a number"):
        read_thresholds(tmp_path)
    for content in ("{}", '{"bbox": {}}', '{"bbox": {"thresholds": {"classes": []}}}', "[]", "5"):
        path.write_text(content)
        with pytest.raises(UserError, match="does not name the best score threshold"):
            read_thresholds(tmp_path)
