"""The plots of training: what is drawn in a panel, and that nothing covers the curves."""

from types import SimpleNamespace

import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from foundation.run_kinds import DETECTION, PRETRAIN, Metric
from reporting import figures


def pretraining(**series):
    """A setting of one pretraining run that has logged these values, by iteration."""
    run = SimpleNamespace(config={}, series=lambda key: series.get(key, {}))
    return SimpleNamespace(groups=[SimpleNamespace(label="corinfomax", runs=[run])])


@pytest.mark.parametrize("last", [9.6, 2.0])
def test_the_legend_of_the_terms_covers_no_curve(last):
    setting = pretraining(total={3: 10.2, 7: last}, big_bang={3: 7.3, 7: 0.7 * last})
    with rc_context(figures.STYLE):
        figure = Figure(figsize=(10.5, 3.3), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        row = figure.subplots(1, 3)
        figures._draw_pretraining(row, setting, {"corinfomax": "#0072b2"})
        canvas.draw()
    legend = row[0].get_legend().get_window_extent()
    assert len(row[0].lines) == 3
    for line in row[0].lines:
        assert not line.get_path().transformed(line.get_transform()).intersects_bbox(legend, filled=False)


def drawn_row(setting, tmp_path, monkeypatch):
    """The axes of one setting of pretraining in the figure of curves."""
    (setting.runs,) = [group.runs for group in setting.groups]
    setting.kind, setting.name, setting.runs[0].lines = SimpleNamespace(name=PRETRAIN), "photos", [{}]
    rows = []
    draw = figures._draw_pretraining
    monkeypatch.setattr(figures, "_draw_pretraining", lambda row, *rest: rows.append(row) or draw(row, *rest))
    assert figures.draw_curves([setting], {"corinfomax": "#0072b2"}, tmp_path / "curves.png")
    return rows[0]


def test_iterations_are_whole_numbers(tmp_path, monkeypatch):
    setting = pretraining(total={3: 10.2}, learning_rate={3: 0.1, 4: 0.2})
    row = drawn_row(setting, tmp_path, monkeypatch)
    assert all(float(tick).is_integer() for axes in row for tick in axes.get_xticks())
    assert len(row[0].get_xticks())


@pytest.mark.parametrize(("value", "top"), [(20.0, 21), (0.0, 1)])
def test_a_value_that_was_measured_once_lies_where_it_was_measured(value, top, tmp_path, monkeypatch):
    metric, axes_of = Metric("box AP", ("results", "bbox", "AP")), []
    series = {"total_loss": {19: 3.0, 299: 1.0, 599: 0.5}, metric.key: {599: value}}
    run = SimpleNamespace(lines=[{}], series=lambda key: series.get(key, {}))
    group = SimpleNamespace(label="corinfomax", runs=[run])
    setting = SimpleNamespace(
        kind=SimpleNamespace(name=DETECTION), name="coco", groups=[group], runs=[run], tasks=[None], headline=[metric]
    )
    draw = figures._draw_detection
    monkeypatch.setattr(figures, "_draw_detection", lambda row, *rest: axes_of.extend(row) or draw(row, *rest))
    assert figures.draw_curves([setting], {"corinfomax": "#0072b2"}, tmp_path / "curves.png")
    loss, ap = axes_of
    assert ap.get_xlim() == loss.get_xlim() == pytest.approx((-0.02 * 599, 1.02 * 599))
    assert ap.get_ylim() == pytest.approx((0, top)), "the marker is not cut off"


def test_a_panel_without_values_has_no_ticks():
    row = Figure().subplots(1, 2)
    figures._draw_pretraining(row, pretraining(total={3: 10.2, 7: 9.6}), {"corinfomax": "#0072b2"})
    assert [text.get_text() for text in row[1].texts] == ["not measured"]
    assert [*row[1].get_xticks(), *row[1].get_yticks()] == []


@pytest.mark.parametrize(("probe", "panels"), [({}, 2), ({"knn_top1": {3: 20.0}}, 3), ({"linear_top1": {3: 20.0}}, 3)])
def test_without_a_probe_there_is_no_panel_of_its_accuracy(probe, panels, tmp_path, monkeypatch):
    setting = pretraining(total={3: 10.2}, learning_rate={3: 0.1, 4: 0.2}, **probe)
    row = drawn_row(setting, tmp_path, monkeypatch)
    assert len(row) == panels
