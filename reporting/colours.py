"""Colours of a report: one for each initialisation in every picture, one for each class in the scenes."""

from collections.abc import Iterable

from reporting.groups import BASELINE

# Okabe and Ito's palette, which is told apart with any colour vision. Two names keep theirs from report to report.
KNOWN = {BASELINE: "#767676", "corinfomax": "#0072b2"}
INITIALISATIONS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Bright ones, since they are seen through: Tol's "bright" and what it lacks, light enough for black text.
CLASSES = (
    *("#ffb000", "#56c8ff", "#ff6f91", "#6fe07a", "#c8a2ff"),
    *("#f2f2f2", "#f4f06a", "#2dd4bf", "#ff8c42", "#f5a3d0"),
)


def of_labels(labels: Iterable[str]) -> dict[str, str]:
    """A colour for each label, in the order of their first appearance."""
    others = [label for label in dict.fromkeys(labels) if label not in KNOWN]
    return KNOWN | {label: INITIALISATIONS[i % len(INITIALISATIONS)] for i, label in enumerate(others)}


def of_classes(ids: Iterable[int]) -> dict[int, str]:
    """A colour for each category, by the order of their ids; beyond the palette's length they repeat."""
    return {identity: CLASSES[i % len(CLASSES)] for i, identity in enumerate(sorted(ids))}
