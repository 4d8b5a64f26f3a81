"""What a command prints where it ends early."""

import pytest

from foundation.errors import resumable, run


def interrupt(_: object) -> None:
    raise KeyboardInterrupt


def interrupt_training(_: object) -> None:
    with resumable():
        raise KeyboardInterrupt


@pytest.mark.usefixtures("as_a_command")
@pytest.mark.parametrize(
    ("main", "said"),
    [
        (interrupt, "interrupted\n"),
        (interrupt_training, "interrupted; the same command with --resume continues from what is saved\n"),
    ],
)
def test_ctrl_c_says_whether_resume_continues(main, said, capsys):
    with pytest.raises(SystemExit) as left:
        run(main)
    assert left.value.code == 130
    assert capsys.readouterr().err == said
