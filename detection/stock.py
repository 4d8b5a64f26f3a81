r"""Run Detectron2's own tools, and programs written for Detectron2, on this project's recipes and datasets.

A program imports this module before `detectron2`. From then on `detectron2.config.get_cfg()` has the keys of this
project's configs, and the registries have the heads that the recipes name:

    import detection.stock
    from detectron2.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file("configs/detection/coco_R50_C4_1x.yaml")

A tool that cannot be changed is run by this module, which also registers the datasets that its config or its arguments
name (`FILE.json@FOLDER` is a dataset of your own):

    python -m detection.stock detectron2/tools/train_net.py --config-file configs/detection/coco_R50_C4_1x.yaml
    python -m detection.stock detectron2/tools/visualize_json_results.py --dataset test.json@images \
        --input found.json --output drawn

Detectron2 reads weights (`.pkl`) and proposals with `pickle`, which runs whatever program is in the file. With this
module they are read by the converter's reader, which runs nothing.

Detectron2's own trainer ignores the keys that this project adds (DATASETS.FRACTION, SOLVER.PRECISION,
SOLVER.ACCUMULATION, ..), and logs weights that do not fit instead of refusing them.
"""

import argparse
import runpy
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from foundation.errors import ArgumentParser, UserError, run


def build_parser() -> ArgumentParser:
    """The arguments of the command."""
    parser = ArgumentParser(
        prog="python -m detection.stock",
        usage="%(prog)s SCRIPT [ARGUMENTS OF THE SCRIPT]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="of Detectron2's source: tools/train_net.py, ..")
    return parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:2]):
    build_parser().parse_args()  # ends here, before Detectron2 is imported

import detection.roi_heads  # registers the head of the C4 recipes
import detection.training.semantic  # noqa: F401  and that for labels of pixels
from convert.reader import load_arrays
from convert.tensors import Record
from detection import config as configs
from detection.data import datasets
from foundation.config import find_config, load_config

# isort: split
from detectron2.checkpoint import detection_checkpoint
from detectron2.config import defaults, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data import build as data_build

configs.add_own_keys(defaults._C)
defaults._C.SEED = 0  # this project's commands take no run without a seed, and should take what a tool has trained


def _load_pickle(file: BinaryIO, **_: Any) -> Any:
    """Stands for `pickle.load`.

    Raises:
        UserError: the file is damaged, or asks for anything but arrays and plain values.
    """
    content = load_arrays(Path(file.name))
    if not isinstance(content, dict):
        raise UserError(f"{file.name} holds neither weights nor proposals; make weights with convert/to_d2.py")
    # The mode of the boxes in a file of proposals is an enumeration: a call with its number.
    return {
        key: value.args[0] if isinstance(value, Record) and len(value.args) == 1 else value
        for key, value in content.items()
    }


for module in (detection_checkpoint, data_build):
    module.pickle = types.SimpleNamespace(load=_load_pickle)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a script of Detectron2's, with the arguments that follow it.

    Raises:
        UserError: there is no such script or config, or the config has a key that does not exist.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    script = build_parser().parse_args(words[:1]).script
    if not script.is_file():
        raise UserError(f"{script}: there is no such script; Detectron2's source has them in tools/")
    rest, names = _with_config(words[1:])
    datasets.register(names)
    with tempfile.TemporaryDirectory() as folder:
        # A copy that begins with this module, because the processes that it starts, one for each GPU, read it anew.
        copy = Path(folder, script.name)
        head = f"import detection.stock\ndetection.stock.datasets.register({names!r})\n"
        copy.write_text(head + script.read_text())
        sys.argv = [str(script), *rest]
        sys.path.insert(0, str(script.resolve().parent))  # as `python SCRIPT` has it
        runpy.run_path(str(copy), run_name="__main__")


def _with_config(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The script's arguments, with the path of the recipe that `--config-file` names; and the datasets to register."""
    option = "--config-file"
    words = [part for word in words for part in (word.split("=", 1) if word.startswith(f"{option}=") else [word])]
    names = [word.rpartition("=")[2] for word in words if datasets.CUSTOM in word]
    names = [name for name in names if "(" not in name]  # a value of a config key
    if option not in words[:-1]:
        return words, names
    place = words.index(option) + 1
    words[place] = str(find_config(words[place], "detection"))
    if words[place].endswith(".py"):  # Detectron2's other kind of config
        return words, names
    config = load_config(get_cfg(), words[place], "detection")
    known = {*DatasetCatalog.list(), *datasets.EMBEDDED, *datasets.VOC_SEGMENTATION}
    named = (*config.DATASETS.TRAIN, *config.DATASETS.TEST)
    return words, names + [name for name in named if name in known or datasets.CUSTOM in name]


def cli() -> NoReturn:
    """The command as a process: errors as one line, exit status 2."""
    run(main)


if __name__ == "__main__":
    cli()
