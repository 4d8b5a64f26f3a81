"""Reading YAML of any origin: bounds on depth that hold before anything is built, so that damage is found at once."""

import time

import pytest
import yaml

from foundation.errors import UserError
from foundation.yaml_files import MAX_DEPTH, read_yaml


def test_depth_is_bounded_exactly(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert read_yaml(path)
    path.write_text("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))
    with pytest.raises(UserError, match="nested more than 50 deep"):
        read_yaml(path)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, "a: " + "[" * 2000, "{a: " * 2000, "- " * 100_000, "? " * 5000, "a: '" + "[" * 2000]
)
def test_deep_and_unfinished_files_are_refused_at_once(tmp_path, text):
    """libyaml crashes when it builds the first, and the pure parser takes seconds."""
    path = tmp_path / "a.yaml"
    path.write_text(text)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"a\.yaml is not (usable|valid) YAML"):
        read_yaml(path)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("entry", ["[{}]", "{{<<: [{}]}}"])
def test_aliases_of_aliases_are_refused_at_once(tmp_path, entry):
    """Merge keys copy what they name while the file is read: ten to the seventh entries here."""
    path = tmp_path / "a.yaml"
    lines = [f"a{i}: &a{i} " + entry.format(", ".join([f"*a{i - 1}"] * 10)) for i in range(1, 8)]
    path.write_text("\n".join(["a0: &a0 {x: 1}", *lines]))
    start = time.monotonic()
    with pytest.raises(UserError, match="more than 100,000 values"):
        read_yaml(path)
    assert time.monotonic() - start < 2


def test_a_file_name_that_is_not_utf8_is_read_as_it_was_written(tmp_path):
    values = {"ROOT": "/ph\udcff/é", "LIST": ["\U0001f600"]}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    assert read_yaml(tmp_path / "a.yaml") == values


def test_merge_keys(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert read_yaml(path)["b"] == {"x": 1, "y": 3}
