"""Reading YAML of any origin: bounds on depth that hold before anything is built, so that damage is found at once."""

import time

import pytest

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
