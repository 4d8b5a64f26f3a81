"""The check of the datasets before a run: the audit, stopped at the first finding that would stop the run."""

from collections.abc import Sequence

from fvcore.common.config import CfgNode

from detection.checks.audit import check_dataset, source
from detection.checks.findings import FatalFindings
from detection.data import datasets
from detection.data.requirements import requirements_of


def check(config: CfgNode, train: Sequence[str], test: Sequence[str]) -> None:
    """See that datasets are complete and hold what the model of `config` requires.

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
