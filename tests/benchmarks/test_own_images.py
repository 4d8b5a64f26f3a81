"""The experiment on own images: its commands are accepted, and its table is that of the finished runs."""

import json
import runpy
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from foundation.config import load_config

pytest.importorskip("detectron2")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "own_images.py"


@pytest.fixture
def experiment() -> dict:
    return runpy.run_path(str(SCRIPT))


def test_every_command_is_accepted(experiment: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from detection import config as recipes
    from pretrain.config import get_defaults, validate
    from pretrain.evaluation.config import get_linear_defaults

    commands: list[list[str]] = []
    monkeypatch.setitem(
        experiment["main"].__globals__, "run", lambda args, *words: commands.append([str(word) for word in words])
    )
    parts = ["--only", "pretrain", "probe", "detection", "--change", "TRAIN.EPOCHS", "3"]
    experiment["main"]([str(tmp_path), str(tmp_path / "out"), "--sets", "garments", "--seeds", "1", *parts])
    scripts = [command[0] for command in commands]
    made = ["pretrain/linear.py", "convert/to_d2.py", "pretrain/linear.py"]
    assert scripts[:4] == ["pretrain/train.py", *made]
    assert scripts.count("detection/train_net.py") == 4  # two numbers of labels, two encoders
    for script, *words in commands:
        pairs = words[next((i for i, word in enumerate(words) if "." in word and word.split(".")[0].isupper()), 0) :]
        if script == "pretrain/train.py":
            config = load_config(get_defaults(), "shapes_R18", "pretrain", pairs)
            validate(config)
            assert (config.TRAIN.EPOCHS, config.DATA.IMAGE_SIZE, config.SEED) == (3, 48, 1)
        elif script == "pretrain/linear.py":
            load_config(get_linear_defaults(), "shapes_R18", "linear", pairs)
        elif script == "detection/train_net.py":
            config = recipes.load("shapes_R18_FPN", ["SEED", "1", *pairs[pairs.index("DATASETS.FRACTION") :]])
            assert config.SOLVER.MAX_ITER == 600


def test_the_table_and_the_figure_hold_the_finished_runs(
    experiment: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, values in {"detection_random_400_seed0": 12.0, "detection_corinfomax_400_seed0": 13.0,
                         "detection_corinfomax_400_seed1": 15.0}.items():  # fmt: skip
        folder = tmp_path / "garments" / name
        folder.mkdir(parents=True)
        scores = {"AP": values, "AP50": 2 * values, "AP75": 1.0}
        (folder / "results.json").write_text(json.dumps({"results": {"bbox": scores}}))
    lines = list(experiment["table"](tmp_path))
    assert "| garments | 400 | random | 12.0 (12.0) | 24.0 (24.0) | 1.0 (1.0) |" in lines
    assert "| garments | 400 | corinfomax | 14.0 ± 1.4 (13.0, 15.0) |" in lines[-1]
    texts = []
    save = Figure.savefig

    def recording(figure: Figure, *rest: object, **options: object) -> None:
        texts.extend(text.get_text() for text in figure.findobj(Text))
        save(figure, *rest, **options)

    monkeypatch.setattr(Figure, "savefig", recording)
    experiment["draw"](tmp_path, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert {"clip art", "garments", "random weights", "CorInfoMax", "box AP on 500 held-out scenes (%)"} <= {*texts}
    assert any("small dots beside them: single seeds" in text for text in texts)


def test_a_set_that_was_interrupted_is_made_again(
    experiment: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(args: object, script: Path, draft: Path, *words: object) -> None:
        (draft / "folder" / "val").mkdir(parents=True, exist_ok=True)
        made.append((script.name, *map(str, words)))
        if len(made) == 1:
            raise SystemExit(1)

    made: list[tuple[str, ...]] = []
    monkeypatch.setitem(experiment["main"].__globals__, "run", make)
    command = [str(tmp_path), str(tmp_path / "out"), "--sets", "garments", "--only", "sets", "--wallpapers", "/papers"]
    with pytest.raises(SystemExit):
        experiment["main"](command)
    assert not (tmp_path / "garments").exists()
    for _ in range(2):
        experiment["main"](command)
    assert made == [("garments.py", "--wallpapers", "/papers")] * 2
    assert (tmp_path / "garments" / "folder" / "val").is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sets", "clipart"], "clipart does not exist; --clipart FOLDER makes it"),
        (["--sets", "garments"], "garments does not exist; --wallpapers FOLDER... makes it"),
        (["--arm", "my_arm"], "--arm is 'my_arm'; choose a name without '_'"),
    ],
)
def test_what_cannot_be_made_is_one_line(experiment: dict, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(experiment["UserError"], match=message):
        experiment["main"]([str(tmp_path), str(tmp_path / "out"), "--only", "sets", *options])
