"""Reading JSON of any origin: the values, the bounds, and the one line that names a damaged file."""

import json
import os
import time
from pathlib import Path

import pytest

from foundation import json_files
from foundation.errors import UserError
from foundation.json_files import MAX_DEPTH, as_number, read_json, read_json_lines


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "file.json"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("value", [{}, [], 5, None, {"a": [1, 2.5, "[[[{", None, True], "ä": {"b": -1e-3}}])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_values_are_what_was_written_with_or_without_a_byte_order_mark(tmp_path, value, encoding):
    path = written(tmp_path, json.dumps(value, ensure_ascii=False).encode(encoding))
    assert read_json(path) == value


def test_brackets_in_strings_are_no_depth(tmp_path):
    value = {"counts": "[[{" * 1000, r"a\"[": ["\\", '"[[', "[" * 5000]}
    assert read_json(written(tmp_path, json.dumps(value).encode())) == value


def test_depth_is_bounded_exactly(tmp_path):
    assert read_json(written(tmp_path, b"[" * MAX_DEPTH + b"]" * MAX_DEPTH))
    with pytest.raises(UserError, match=r"file\.json is not usable JSON: it is nested more than 100 deep"):
        read_json(written(tmp_path, b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe\x00",
        b'{"a": 1',
        b"[1,]",
        b'{"a": ' + b"1" * 6000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'"' + b'\\"' * 500_000 + b"[" * 200,  # a string that does not end
        b"\x80" * 100,
    ],
)
def test_damage_is_one_line_that_names_the_file_at_once(tmp_path, data):
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        read_json(written(tmp_path, data))
    assert str(caught.value).startswith(str(tmp_path / "file.json"))
    assert time.monotonic() - start < 2


def test_what_is_no_file_of_a_sane_size_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.json cannot be read: No such file"):
        read_json(tmp_path / "none.json")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        for read in (read_json, read_json_lines):
            with pytest.raises(UserError, match="is not a file"):
                read(path)
    for read in (read_json, read_json_lines):
        with pytest.raises(UserError, match="is too large: 5 bytes, where 4 are allowed"):
            read(written(tmp_path, b"[1,2]"), max_bytes=4)


def test_lines_that_are_no_objects_are_skipped_and_counted_once(tmp_path, caplog):
    lines = [b'\xef\xbb\xbf{"a": 1}', b"5", b"", b"\xff\xff", b"[" * 100_000, b'{"a": 2}', b"{}", b'{"a":']
    path = written(tmp_path, b"\n".join(lines))
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}, {}]
    (record,) = caplog.records
    text = f"{path}: skipped 3 lines, the first of them 2, because a line must be one JSON object"
    assert record.getMessage() == text


def test_a_half_written_last_line_is_no_damage(tmp_path, caplog):
    assert read_json_lines(written(tmp_path, b'{"a": 1}\n{"a": 2')) == [{"a": 1}]
    assert read_json_lines(written(tmp_path, b'{"a": 1}\n{"a": 2}')) == [{"a": 1}, {"a": 2}]
    assert not caplog.records


def test_a_line_without_bounds_costs_no_memory_and_no_other_line(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_LINE_BYTES", 10)
    long = b'{"a": "' + b"x" * 1000 + b'"}\n'
    assert read_json_lines(written(tmp_path, b'{"a": 1}\n' + long + b'{"a": 22}\n' + long)) == [{"a": 1}, {"a": 22}]


def test_numbers_are_finite_and_fit_a_float():
    assert [as_number(value) for value in (3, -2.5, 0)] == [3.0, -2.5, 0.0]
    for value in (True, None, "3", [3], float("nan"), float("inf"), 10**400):
        assert as_number(value) is None
