"""results.json: what a run found, for people and for reports."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foundation.errors import UserError
from foundation.files import write_atomic


def write_results(run: Path, results: Mapping[str, Any]) -> None:
    """Write a run's results.json."""
    write_atomic(run / "results.json", (json.dumps(results, indent=2) + "\n").encode())


def read_results(run: Path) -> dict[str, Any] | None:
    """A run's results, or None where it has none yet. Raises UserError where the file is damaged."""
    path = run / "results.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); run the evaluation again") from error
