"""What linear evaluation and fine-tuning share as commands: signals before there is a run."""

import signal
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from foundation.signals import STOPPED
from pretrain import finetune, linear

ARGUMENTS = ["--config", "shapes_R18", "--weights", "random"]


@pytest.fixture
def signal_at_import(monkeypatch: pytest.MonkeyPatch) -> Callable[[signal.Signals], None]:
    """Have this process get a signal when the command imports what it needs."""

    def prepare(number: signal.Signals) -> None:
        class Module(types.ModuleType):
            def __getattr__(self, name: str) -> Any:
                signal.raise_signal(number)

        monkeypatch.setitem(sys.modules, "pretrain.evaluation.command", Module("command"))

    return prepare


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("main", [linear.main, finetune.main])
def test_a_signal_during_the_imports_is_answered(
    main: Callable[[Sequence[str]], None],
    number: signal.Signals,
    signal_at_import: Callable[[signal.Signals], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    signal_at_import(number)
    with pytest.raises(SystemExit) as left:
        main(ARGUMENTS)
    assert left.value.code == STOPPED
    assert capfd.readouterr().err == f"{number.name} received: stopping before the first step, nothing is lost\n"


@pytest.mark.parametrize("main", [linear.main, finetune.main])
def test_ctrl_c_during_the_imports_says_how_to_go_on(
    main: Callable[[Sequence[str]], None], signal_at_import: Callable[[signal.Signals], None]
) -> None:
    signal_at_import(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="the same command with --resume continues"):
        main(ARGUMENTS)
