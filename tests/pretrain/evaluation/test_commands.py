"""The evaluation's commands: `--help` answers without the time that torch takes to import."""

import subprocess
import sys
from pathlib import Path

COMMANDS = ("linear", "finetune", "transfer", "sweep", "figures")
HEAVY = {"torch", "numpy", "matplotlib", "sklearn", "fvcore"}


def test_help_imports_nothing_heavy() -> None:
    scripts = [str(Path(__file__).parents[3] / "pretrain" / f"{name}.py") for name in COMMANDS]
    code = f"""
import runpy, sys
for script in {scripts!r}:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as leaving:
        assert leaving.code in (None, 0), script
    loaded = {HEAVY!r} & set(sys.modules)
    assert not loaded, (script, loaded)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"usage: pretrain/{name}.py" in done.stdout for name in COMMANDS)
