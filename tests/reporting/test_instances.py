"""Objects and detections of an image: which are found, how masks decode, and files that are damaged."""

import json
import tracemalloc

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from foundation.errors import UserError
from reporting.instances import Instance, decode_mask, iou, match, read_detections, read_ground_truth

SIZE = 24


def box(category, left, score=1.0, crowd=False, width=10):
    return Instance(category, (left, 0, left + width, 10), score, crowd=crowd)


def count(objects, detections):
    matches = match(objects, detections)
    assert len(matches.found) + len(matches.missed) == sum(not each.crowd for each in objects)
    return len(matches.found), len(matches.false)


def test_an_object_is_found_once_and_by_its_class():
    assert count([box(1, 0)], [box(1, 2), box(1, 0)]) == (1, 1)
    assert count([box(1, 0)], [box(2, 0)]) == (0, 1)
    assert count([box(1, 0)], [box(1, 3)]) == (1, 0)  # IoU 7/13 = 0.54
    assert count([box(1, 0)], [box(1, 4)]) == (0, 1)  # IoU 6/14 = 0.43
    assert count([box(1, 0), box(1, 1)], [box(1, 0, 0.6), box(1, 1, 0.9)]) == (2, 0)
    assert iou((0, 0, 10, 10), (3, 0, 13, 10)) == pytest.approx(7 / 13)
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_a_crowd_is_neither_found_nor_missed_and_excuses_what_lies_in_it():
    crowd = box(1, 0, crowd=True, width=100)
    assert count([crowd], []) == (0, 0)
    assert count([crowd], [box(1, 50), box(1, 96), box(2, 50)]) == (0, 2)  # the second lies 4/10 in it


def test_masks_of_every_spelling_decode(square, run_length_code):
    polygon = [4, 6, 14, 6, 14, 18, 4, 18]
    counts = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], square.T.ravel(), [2]])))).tolist()
    for spelling in ([polygon], run_length_code, {"size": [SIZE, SIZE], "counts": counts}):
        np.testing.assert_array_equal(decode_mask(spelling, SIZE, SIZE), square)
    assert decode_mask(None, SIZE, SIZE) is None


def test_compressed_codes_decode_as_pycocotools_does():
    rng = np.random.default_rng(0)
    for _ in range(100):
        height, width = (int(side) for side in rng.integers(1, 80, 2))
        mask = (rng.random((height, width)) < rng.random()).astype(np.uint8)
        counts = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
        np.testing.assert_array_equal(decode_mask({"size": [height, width], "counts": counts}, height, width), mask)


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [2**31 - 1, 2**31 - 1], "counts": "0"},
        {"size": [SIZE, SIZE], "counts": "PPPPPPPPPPPPPPPPPPPPPPPPP0"},
        {"size": [SIZE, SIZE], "counts": "o" * 50},
        {"size": [SIZE, SIZE], "counts": "P"},
        {"size": [SIZE, SIZE], "counts": "\x00ä"},
        {"size": [SIZE, SIZE], "counts": [2**62, 5]},
        {"size": [SIZE, SIZE], "counts": [-5, SIZE * SIZE + 5]},
        {"size": [SIZE, SIZE], "counts": [1, 2]},
        {"size": [SIZE, SIZE], "counts": [1.5, "x"]},
        {"size": [SIZE], "counts": 5},
        {"counts": "0"},
        "text",
        5,
        [[None]],
        [[]],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[0, 0, 1e300, 0, 1e300, 1e300]],
        [[0, 0, 9e5, 9e5] * 1000],
        [[0, 0, float("nan"), 1, 2, 2]],
        [{"a": 1}],
    ],
)
def test_a_malformed_mask_is_none(segmentation):
    """No crash, and no memory for what a file merely claims."""
    tracemalloc.start()
    assert decode_mask(segmentation, SIZE, SIZE) is None
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def dataset(tmp_path, **changes):
    content = {
        "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
        "categories": [{"id": 7, "name": "cat", "skeleton": [[1, 2], ["a"], 5]}],
        "annotations": [{"image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4], "iscrowd": 1}],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content | changes))
    return path


def test_malformed_entries_are_skipped_and_counted_once(tmp_path, caplog):
    good = {"image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4]}
    bad = [
        *({**good, "bbox": value} for value in ("1 2 3 4", [1, 2, 3], [1, 2, None, 4], [1, 2, 1e30, 4], [1, 2, -3, 4])),
        *({**good, "image_id": value} for value in (9, "01", [1], None)),
        *({**good, "category_id": value} for value in (8, "cat", {})),
    ]
    path = dataset(tmp_path, annotations=[good, *bad, 5, None])
    truth = read_ground_truth(path, tmp_path)
    assert [each.box for each in truth.objects[1]] == [(1, 2, 4, 6)]
    assert truth.skeletons == {7: [(0, 1)]}
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: skipped 12 entries without known image, known category or box of numbers"
    ]
    detections = tmp_path / "results.json"
    detections.write_text(json.dumps([{**good, "score": score} for score in (0.9, 0.4, "x", None, 1e999, 0.6)] + [3]))
    assert [each.score for each in read_detections(detections, truth, 0.5)[1]] == [0.6, 0.9]


def test_numbers_may_be_text_where_training_reads_them(tmp_path):
    crowds = [{"iscrowd": value} for value in (None, 0, "0", False, 1, "1", True)]
    objects = [{"image_id": 1, "category_id": 7, "bbox": ["1", "2", "3.5", 4], **each} for each in crowds]
    found = read_ground_truth(dataset(tmp_path, annotations=objects), tmp_path).objects[1]
    assert {each.box for each in found} == {(1, 2, 4.5, 6)}
    assert [each.crowd for each in found] == [False, False, False, False, True, True, True]


def test_ids_may_be_text_or_have_a_decimal_point(tmp_path):
    """As the reader of training data has it: 1, 1.0 and "1" are the same."""
    images = [{"id": "1", "file_name": "1.jpg"}, {"id": "night/7", "file_name": "7.jpg"}]
    objects = [{"image_id": image, "category_id": 7.0, "bbox": [0, 0, 9, 9]} for image in (1, "night/7")]
    truth = read_ground_truth(dataset(tmp_path, images=images, annotations=objects), tmp_path)
    assert {image: len(found) for image, found in truth.objects.items()} == {1: 1, "night/7": 1}
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{**each, "score": 0.9, "category_id": "7"} for each in objects]))
    assert set(read_detections(path, truth, 0.5)) == {1, "night/7"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "has no images with an id and a file_name"),
        ({"images": {"a": 1}}, "it needs a list of images"),
        ({"annotations": None}, "it needs a list of annotations"),
    ],
)
def test_what_is_no_dataset_is_named(tmp_path, changes, message):
    path = dataset(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as error:
        read_ground_truth(path, tmp_path)
    assert str(path) in str(error.value)


def test_predictions_of_another_dataset_are_refused(tmp_path):
    truth = read_ground_truth(dataset(tmp_path), tmp_path)
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{"image_id": 1, "category_id": 9, "bbox": [1, 2, 3, 4], "score": 0.9}]))
    with pytest.raises(UserError, match=r"results\.json: the dataset has no category 9"):
        read_detections(path, truth, 0.5)
