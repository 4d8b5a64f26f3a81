"""Published results: the file's form, numbers of the sources, and what is said of a measured number."""

import re
from pathlib import Path

import pytest

from foundation.config import config_folder
from foundation.published import compare, of_recipe
from foundation.yaml_files import read_yaml


def test_every_table_is_whole() -> None:
    """Each column names a recipe that exists, and each row has a number or null for each column."""
    for table in read_yaml(config_folder("published.yaml"))["tables"]:
        recipes = {path.stem for path in config_folder(table["command"]).glob("*.yaml")}
        assert {column["recipe"] for column in table["columns"]} <= recipes
        assert len({(column["recipe"], column["metric"]) for column in table["columns"]}) == len(table["columns"])
        for label, numbers in table["rows"].items():
            assert isinstance(label, str)
            assert len(numbers) == len(table["columns"]), (table["source"], label)
            assert all(number is None or (isinstance(number, float) and 0 < number < 100) for number in numbers)


def test_numbers_of_the_sources() -> None:
    rows = {(row.label, row.source.split(" (")[0]): row for row in of_recipe("cifar100_R18", "linear")}
    article = rows["CorInfoMax", "thesis Table 5.1"]
    assert (article.values, article.margins) == ({"linear_top1": 71.61}, {"linear_top1": 0.45})
    assert rows["SimCLR", "thesis Table 5.1"].values == {"linear_top1": 66.83}
    assert rows["SimCLR", "thesis Table B.2"].values == {"linear_top1": 65.78, "linear_top5": 89.04}
    assert [row.label for row in of_recipe("imagenet100_R50", "linear")] == ["SimSiam", "BYOL", "CorInfoMax"]
    few = {row.label: row.values for row in of_recipe("imagenet1k_10percent", "finetune")}
    assert few == {"VICReg": {"top1": 62.16}, "CorInfoMax": {"top1": 64.36}}
    voc = {row.label: row for row in of_recipe("voc_R50_C4_24k", "detection")}
    assert len(voc) == 12
    assert voc["VICReg"].values == {"bbox/AP50": 82.4}
    (keypoints,) = of_recipe("coco_keypoints_R50_FPN", "detection")
    assert keypoints.values == {"bbox/AP": 53.6, "keypoints/AP": 64.0}
    assert of_recipe("cifar100_R18", "pretrain") == of_recipe(None, "linear") == of_recipe("mine", "detection") == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (71.3, "71.30: within the margin of 71.61 (CorInfoMax, thesis Table 5.1"),
        (72.05, "72.05: within the margin of 71.61"),
        (71.16, "71.16: 0.45 below 71.61, not within the margin of 0.45"),
        (72.06, "72.06: 0.45 above 71.61, not within the margin of 0.45"),
    ],
)
def test_a_measured_number_is_held_against_the_margin(value: float, text: str) -> None:
    found = compare(value, "cifar100_R18", "linear", "linear_top1")
    assert found is not None
    assert found.startswith(text)


def test_without_a_margin_the_difference_is_given() -> None:
    assert compare(44.0, "imagenet1k_1percent", "finetune", "top1", "vicreg") == (
        "44.00: 0.75 below 44.75 (VICReg, thesis Table 5.2, after 100 epochs of pretraining)"
    )
    assert "70.90 (Barlow Twins" in str(compare(71.0, "cifar100_R18", "linear", "linear_top1", "barlow_twins"))
    assert compare(44.89, "imagenet1k_1percent", "finetune", "top1").startswith("44.89: equal to 44.89")
    assert compare(50.0, "shapes_R18", "linear", "linear_top1") is None
    assert compare(50.0, "cifar10_R18", "linear", "knn_top1") is None
    assert compare(50.0, "cifar10_R18", "linear", "linear_top1", "random") is None


def test_tables_of_the_documents_repeat_the_published_numbers() -> None:
    """Rows that name a recipe and what the article, or supervised weights, reach with it."""
    root = Path(__file__).parents[2]
    text = "\n".join(path.read_text() for path in (root / "README.md", *(root / "docs").glob("*.md")))
    checked = 0
    for recipe, value in re.findall(r"^\|[^\n]*\| `(\w+)` \| [\d +]+ \| (\d\d\.\d\d) \|", text, re.M):
        for command, metric in (("linear", "linear_top1"), ("finetune", "top1")):
            ours = [row for row in of_recipe(recipe, command) if row.label == "CorInfoMax"]
            for row in ours[:1]:
                assert float(value) == row.values[metric], recipe
                checked += 1
    tasks = {"boxes": "bbox/AP", "masks": "segm/AP", "keypoints": "keypoints/AP", "AP50": "bbox/AP50"}
    for recipe, cell in re.findall(r"^\| `(\w+)` \|[^\n]*\| ([^|\n]*\d\.\d[^|\n]*) \|$", text, re.M):
        rows = of_recipe(recipe, "detection")
        for word, number in re.findall(r"(boxes|masks|keypoints|AP50) (\d\d\.\d)", cell) if rows else ():
            assert float(number) in [row.values.get(tasks[word]) for row in rows], (recipe, word)
            checked += 1
    assert checked > 15


@pytest.mark.parametrize("value", [54.36, 55.36])
def test_a_difference_as_large_as_the_margin_is_not_within_it(value: float) -> None:
    found = compare(value, "tiny_imagenet_R50", "linear", "linear_top1")
    assert found is not None
    assert "not within the margin of 0.50" in found
