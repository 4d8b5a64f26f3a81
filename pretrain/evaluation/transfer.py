"""Transfer: classifiers of scikit-learn on the frozen features of other images; logistic regression, VOC07's SVMs."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.preprocessing import StandardScaler, normalize
from sklearn.svm import LinearSVC

from foundation.config import RUN_CONFIG
from foundation.errors import UserError
from pretrain.config import resolve_precision
from pretrain.evaluation.features import Pipeline, extract
from pretrain.images.sources import Source
from pretrain.images.voc07 import IGNORED, MultiLabelSource
from pretrain.runs.folder import read_results
from pretrain.runs.weights import EncoderWeights, build_from

STRENGTHS = tuple(float(c) for c in np.logspace(-6, 4, 11))  # inverse regularisation C of the logistic regression
HELD_OUT = 0.1  # fraction of the training images on which C is chosen
VOC07_COSTS = (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)  # VISSL's
VOC07_FOLDS = 3
logger = logging.getLogger("pretrain")
Features = Callable[[Source], tuple[np.ndarray, np.ndarray]]


def build_features(
    weights: EncoderWeights, name: str, stem: str, size: int, workers: int, device: torch.device
) -> Features:
    """Source -> features (N, F) of central crops and labels (N,).

    Args:
        weights: of the encoder.
        name, stem: its architecture.
        size: pixels of the central crop.
        workers: loader processes.
        device: where to compute.
    """
    encoder = build_from(weights, name, stem).to(device)
    mean, std = (torch.tensor(values, device=device) for values in weights.statistics)
    pipeline = Pipeline(size, mean, std, workers, device)

    def features(source: Source) -> tuple[np.ndarray, np.ndarray]:
        rows, labels = extract(encoder, source, pipeline, precision=resolve_precision("auto", device), title="features")
        return rows.numpy(), labels.numpy()

    return features


def check_classes(train: Source) -> None:
    """Refuse a class with a single training image, which cannot be both trained on and held out. Raises UserError."""
    counts = np.bincount(np.asarray(train.labels), minlength=len(train.classes))
    single = [name for name, count in zip(train.classes, counts, strict=True) if count == 1]
    if single:
        raise UserError(
            f"{len(single)} of {len(train.classes)} classes have one training image only, such as {single[0]!r}: each "
            "needs two or more, because some are held out to choose C"
        )


def check_presence(train: MultiLabelSource) -> None:
    """Refuse a class that too few training images have, or lack, for each fold to hold one. Raises UserError."""
    for name, column in zip(train.classes, train.present.T, strict=True):
        for value, verb in ((1, "show"), (0, "lack")):
            count = int((column == value).sum())
            if count < VOC07_FOLDS:
                raise UserError(
                    f"--voc07: {count} of the {len(train)} images of trainval {verb} {name!r}, and the "
                    f"cross-validation needs {VOC07_FOLDS}; unpack VOC2007 again"
                )


def refuse_other_results(output: Path, about: Mapping[str, Any]) -> None:
    """Refuse a folder with a run, or with another evaluation's results, which would be replaced.

    Args:
        output: the folder.
        about: what identifies the evaluation in results.json. Results of earlier versions lack some of it, and damaged
            ones do not count.

    Raises:
        UserError: a value differs, or there is a run.
    """
    if (output / RUN_CONFIG).is_file():
        raise UserError(f"{output} holds a run; choose another --output")
    try:
        found = read_results(output) or {}
    except UserError:
        return
    differing = [f"{key} {found[key]!r}" for key in about if key in found and found[key] != about[key]]
    if differing:
        raise UserError(
            f"{output} holds the results of another evaluation ({', '.join(differing)}); choose another --output"
        )


def evaluate_folder(train: Source, val: Source, features: Features, seed: int) -> dict[str, Any]:
    """Accuracy of logistic regression on class folders."""
    results = logistic_regression(*features(train), *features(val), seed=seed)
    logger.info("logistic regression, C %g: top-1 %.2f %%", results["c"], results["top1"])
    held_out = list(results["held_out"].values())
    if is_at_end(results["c"], STRENGTHS):
        logger.info(
            "C %g is at the end of its grid, %g to %g: a better value may lie beyond it; %d of the %d values are "
            "equally good on the images held out",
            *(results["c"], STRENGTHS[0], STRENGTHS[-1], held_out.count(max(held_out)), len(held_out)),
        )
    return results


def evaluate_voc07(train: MultiLabelSource, test: MultiLabelSource, features: Features) -> dict[str, Any]:
    """Mean average precision of linear SVMs on VOC07."""
    train_rows, test_rows = features(train)[0], features(test)[0]
    results = voc07_svm(train_rows, train.present, test_rows, test.present)
    by_class = dict(zip(train.classes, results["ap"], strict=True))
    logger.info("VOC07: mAP %.2f %%", results["map"])
    ends = [name for name, cost in zip(train.classes, results["c"], strict=True) if is_at_end(cost, VOC07_COSTS)]
    if ends:
        grid = f"{VOC07_COSTS[0]:g} to {VOC07_COSTS[-1]:g}"
        logger.info("C is at the end of its grid, %s, for %d of the classes: %s", grid, len(ends), ", ".join(ends))
    return {"map": results["map"], "ap": by_class}


def is_at_end(best: float, grid: Sequence[float]) -> bool:
    """Whether a search has chosen the first or the last value of its grid."""
    return best in (grid[0], grid[-1])


def logistic_regression(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    seed: int,
    strengths: Sequence[float] = STRENGTHS,
) -> dict[str, Any]:
    """Accuracy in percent on the test features, with C chosen on a tenth of the training features held out.

    Features are scaled to mean 0 and variance 1, so that one grid of C fits any encoder. Of equally good
    ones, the smallest C is taken.

    Args:
        train, test: (M, F) and (N, F).
        train_labels, test_labels: (M,) and (N,), from 0 on.
        seed: of the choice of the images held out.

    Returns:
        {"top1", "c", "held_out": {C: percent}}
    """
    scaler = StandardScaler().fit(train)
    train, test = scaler.transform(train), scaler.transform(test)
    classes = len(np.unique(train_labels))
    count = max(round(HELD_OUT * len(train)), classes)
    fit_rows, held_rows, fit_labels, held_labels = train_test_split(
        train, train_labels, test_size=count, random_state=seed, stratify=train_labels
    )
    held = {c: 100 * float(_fit(fit_rows, fit_labels, c).score(held_rows, held_labels)) for c in strengths}
    best = max(strengths, key=lambda c: (held[c], -c))
    top1 = 100 * float(_fit(train, train_labels, best).score(test, test_labels))
    return {"top1": top1, "c": best, "held_out": {f"{c:g}": value for c, value in held.items()}}


def _fit(rows: np.ndarray, labels: np.ndarray, c: float) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # weak regularisation needs more steps than it is worth
        return LogisticRegression(C=c, max_iter=1000).fit(rows, labels)


def voc07_svm(
    train: np.ndarray, train_present: np.ndarray, test: np.ndarray, test_present: np.ndarray
) -> dict[str, Any]:
    """Average precision in percent of one linear SVM for each class.

    Features are scaled to unit length. An image in which a class is `IGNORED` is left out for
    that class. Average
    precision is the mean of the precisions at the positives.

    Args:
        train, test: (M, F) and (N, F).
        train_present, test_present: (M, C) and (N, C) of 1, 0 and `IGNORED`.

    Returns:
        {"map": percent, "ap": [percent of each class], "c": [of each class]}
    """
    train, test = normalize(train), normalize(test)
    precisions, costs = [], []
    for number in range(train_present.shape[1]):
        used = train_present[:, number] != IGNORED
        rows, labels = train[used], train_present[used, number]
        cost = max(VOC07_COSTS, key=lambda c: (_cross_validated(rows, labels, c), -c))
        scored = test_present[:, number] != IGNORED
        scores = _svm(rows, labels, cost).decision_function(test[scored])
        precisions.append(100 * float(average_precision_score(test_present[scored, number], scores)))
        costs.append(cost)
    return {"map": float(np.mean(precisions)), "ap": precisions, "c": costs}


def _cross_validated(rows: np.ndarray, labels: np.ndarray, cost: float) -> float:
    folds = StratifiedKFold(VOC07_FOLDS).split(rows, labels)
    found = [
        average_precision_score(labels[test], _svm(rows[fit], labels[fit], cost).decision_function(rows[test]))
        for fit, test in folds
    ]
    return float(np.mean(found))


def _svm(rows: np.ndarray, labels: np.ndarray, cost: float) -> LinearSVC:
    # Positives weigh twice, as in VISSL.
    machine = LinearSVC(
        C=cost, class_weight={1: 2, 0: 1}, loss="squared_hinge", penalty="l2", dual=True, tol=1e-4, max_iter=2000
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 2000 iterations are the protocol
        return machine.fit(rows, labels)
