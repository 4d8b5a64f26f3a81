"""`--list-runs`: the runs of all commands below a folder, and which of them can be continued."""

from pathlib import Path

from tabulate import tabulate

from foundation.run_states import find_runs

UNVERIFIED = "step: of the last checkpoint that is whole; its content is verified by --resume"


def table(root: Path) -> str:
    """The runs below a folder as lines of text. Raises UserError where there is no such folder."""
    rows = [
        [
            str(run.folder),
            run.kind.name,
            run.progress,
            "-" if run.step is None else f"{run.step:,}",
            run.saved.strftime("%Y-%m-%d %H:%M") if run.saved else "-",
            run.outlook,
        ]
        for run in find_runs(root)
    ]
    lines = tabulate(rows, ["run", "kind", "progress", "step", "saved", "state"], "simple", disable_numparse=True)
    return f"{lines}\n{UNVERIFIED}" if any(row[3] != "-" for row in rows) else lines
