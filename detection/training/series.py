"""Several runs of one recipe, one after the other: seeds, to measure the spread by chance, and learning rates.

Each run has a folder of its own below OUTPUT_DIR. The same command again continues: finished runs are kept, an
interrupted one is resumed. The metrics of all runs, their means and sample standard deviations are in `seeds.json`, or
`sweep.json` where learning rates are given. They include the finished runs of earlier commands with other seeds or
learning rates.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from tabulate import tabulate

from detection import config as configs
from detection.training import run_folder
from foundation.config import RUN_CONFIG
from foundation.errors import UserError
from foundation.json_files import read_json

HEADLINES = ("AP", "AP50", "AP75", "mIoU")  # of each task, for the table; the file has all
OF_RATE, OF_SEED = "lr", "seed"  # with the value, the names of the folders
Metrics = dict[str, float]  # "bbox/AP" and so on


@dataclass(frozen=True, eq=False)
class Member:
    """One run of a series.

    Attributes:
        learning_rate: SOLVER.BASE_LR, the row of the table that it belongs to.
        config: its own, with its folder as OUTPUT_DIR.
    """

    learning_rate: float
    seed: int
    config: CfgNode

    @property
    def folder(self) -> Path:
        """Where it is."""
        return Path(self.config.OUTPUT_DIR)


def plan(config: CfgNode, learning_rates: Sequence[float], seeds: Sequence[int]) -> list[Member]:
    """The runs, by learning rate and then by seed. Where either is empty, the config's own, without a folder for it.

    Raises:
        UserError: two runs are the same.
    """
    members = []
    for learning_rate in learning_rates or [config.SOLVER.BASE_LR]:
        for seed in seeds or [config.SEED]:
            own = config.clone()
            own.SOLVER.BASE_LR, own.SEED = learning_rate, seed
            parts = [f"{OF_RATE}{learning_rate:g}"] * bool(learning_rates) + [f"{OF_SEED}{seed}"] * bool(seeds)
            own.OUTPUT_DIR = str(Path(config.OUTPUT_DIR, *parts))
            members.append(Member(learning_rate, seed, own))
    folders = [member.folder for member in members]
    if len(set(folders)) < len(folders):
        raise UserError("--seeds or --sweep-lr names a run twice; give each value once")
    if not all(learning_rates):
        raise UserError("--sweep-lr needs learning rates above 0")
    return members


def run(folder: Path, members: Sequence[Member], train: Callable[[CfgNode], None]) -> None:
    """Train the runs that are not finished, then print the table. A run that fails does not end the series.

    The table has the finished runs of earlier commands too, which gave other seeds or learning rates.

    Args:
        folder: of the series; for the file, which is written after each run.
        members: of the series.
        train: does one run, in the folder that its config names, from where it was.

    Raises:
        UserError: runs failed; the table has the others.
    """
    name = "sweep.json" if any(part.startswith(OF_RATE) for part in _layout(folder, members[0])) else "seeds.json"
    earlier = _finished_earlier(folder, members)
    finished = [*(member for member in members if run_folder.is_finished(member.config)), *earlier]
    found = {member: read_metrics(member.folder) for member in finished}
    planned = len(members) + len(earlier)
    failed: dict[Member, str] = {}
    _write(folder / name, found, planned)
    for number, member in enumerate(members, 1):
        if member in found:
            continue
        print(f"run {number} of {len(members)}: {member.folder}", flush=True)
        try:
            train(member.config)
        except UserError as error:
            failed[member] = str(error)
            print(f"{member.folder} failed: {error}", flush=True)
            continue
        found[member] = read_metrics(member.folder)
        found = {each: found[each] for each in [*members, *earlier] if each in found}  # in the order of the command
        _write(folder / name, found, planned)
    if found:
        print(f"\n{table(summarise(found))}\n\nAll metrics are in {folder / name}")
    if failed:
        named = "; ".join(f"{member.folder}: {error}" for member, error in failed.items())
        raise UserError(f"{len(failed)} of {len(members)} runs failed: {named}")


def _layout(folder: Path, member: Member) -> list[str]:
    """The patterns of the folders from that of the series down to a run's."""
    parts = member.folder.relative_to(folder).parts
    return [f"{kind}*" for part in parts for kind in (OF_RATE, OF_SEED) if part.startswith(kind)]


def _finished_earlier(folder: Path, members: Sequence[Member]) -> list[Member]:
    """The finished runs of a series that are not among these, and differ from them in seed or learning rate alone."""
    layout, known = _layout(folder, members[0]), {member.folder for member in members}
    earlier = []
    for path in sorted(set(folder.glob("/".join(layout))) - known):
        own = members[0].config.clone()
        try:
            begun = configs.load(str(path / RUN_CONFIG))
            if f"{OF_RATE}*" in layout:
                own.SOLVER.BASE_LR = begun.SOLVER.BASE_LR
            if f"{OF_SEED}*" in layout:
                own.SEED = begun.SEED
            own.OUTPUT_DIR = str(path)
            if run_folder.is_finished(own):
                earlier.append(Member(own.SOLVER.BASE_LR, own.SEED, own))
        except UserError:  # of another config, or damaged
            continue
    return sorted(earlier, key=lambda member: (member.learning_rate, member.seed))


def read_metrics(folder: Path) -> Metrics:
    """The metrics of a finished run, by names like `bbox/AP`; without those that are averages over nothing."""
    results = read_json(folder / "results.json")["results"]
    return {
        f"{task}/{name}": value
        for task, metrics in results.items()
        for name, value in metrics.items()
        if value is not None
    }


def summarise(found: Mapping[Member, Metrics]) -> list[dict[str, Any]]:
    """For each learning rate, mean and sample standard deviation of each metric over its runs (of one run None)."""
    summary = []
    for learning_rate in dict.fromkeys(member.learning_rate for member in found):
        runs = [metrics for member, metrics in found.items() if member.learning_rate == learning_rate]
        names = [name for name in runs[0] if all(name in metrics for metrics in runs)]
        values = {name: [metrics[name] for metrics in runs] for name in names}
        summary.append({
            "rate": learning_rate,
            "count": len(runs),
            "metrics": {
                name: {"mean": statistics.fmean(each), "spread": statistics.stdev(each) if len(each) > 1 else None}
                for name, each in values.items()
            },
        })  # fmt: skip
    return summary


def table(summary: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table: a row for each learning rate, a column for each headline."""
    names = [
        name
        for name in dict.fromkeys(name for row in summary for name in row["metrics"])
        if name.partition("/")[2] in HEADLINES
    ]
    rows = [[f"{row['rate']:g}", row["count"], *(_cell(row["metrics"].get(name)) for name in names)] for row in summary]
    return tabulate(rows, ["learning rate", "runs", *names], "pipe", disable_numparse=True)


def _cell(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return "-"
    return f"{metric['mean']:.2f}" + (f" ± {metric['spread']:.2f}" if metric["spread"] is not None else "")


def _write(path: Path, found: Mapping[Member, Metrics], planned: int) -> None:
    """Write the file of a series, if there are results."""
    if found:
        content = {"kind": "series", "planned": planned, "runs": _rows(found), "means": summarise(found)}
        run_folder.write_json(path, content)


def _rows(found: Mapping[Member, Metrics]) -> list[dict[str, Any]]:
    return [
        {"rate": member.learning_rate, "seed": member.seed, "folder": str(member.folder), "metrics": metrics}
        for member, metrics in found.items()
    ]
