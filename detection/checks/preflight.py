"""The check of the datasets before a run: the audit, stopped at the first finding that would stop the run.

Of the warnings it prints those of objects that are lost, which nothing in the run shows.
"""

from collections.abc import Iterator, Sequence

from fvcore.common.config import CfgNode

from detection.checks.audit import check_dataset, source
from detection.checks.findings import LOST_OBJECTS, FatalFindings
from detection.data import datasets
from detection.data.requirements import requirements_of


def check(config: CfgNode, train: Sequence[str], test: Sequence[str]) -> None:
    """See that datasets are complete and hold what the model of `config` requires, and warn of objects that are lost.

    Images to evaluate on are decoded: a damaged one would otherwise be found after the training. Of images to train on
    headers are read.

    Args:
        config: of the run.
        train: names of the datasets to train on.
        test: names of the datasets to evaluate on.

    Raises:
        UserError: something would stop the run; the message names the file and the record or key.
    """
    datasets.register((*train, *test))
    model_classes, requirements = datasets.model_classes(config), requirements_of(config)
    for training, names in ((True, train), (False, test)):
        for name in names:
            findings = FatalFindings(training, decode=not training, source=source(name))
            check_dataset(name, model_classes, requirements, findings)
            for line in _describe_lost(findings):
                print(f"warning: {line}")


def _describe_lost(findings: FatalFindings) -> Iterator[str]:
    """A line for each defect by which objects are lost: how many have it, the first of them, and what happens."""
    for found in findings:
        if found.defect in LOST_OBJECTS:
            yield (
                f"{findings.source}: {found.defect.what} ({found.count:,}, the first: {found.examples[0]}):"
                f" {findings.consequence(found).text}; --check-data shows more"
            )
