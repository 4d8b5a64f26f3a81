"""A detector on a GPU beside the same on a CPU, and its runs there."""

import copy
import json

import pytest
import torch

pytest.importorskip("detectron2")

from detection import config as configs
from detection import train_net
from detection.training import trainer

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")


def picture(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"image": torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8, generator=generator)}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("recipe", ["shapes_R18_FPN", "shapes_R50_C4"])
def test_features_equal_those_of_a_cpu(recipe, layout):
    config, _ = configs.for_one_process(configs.load(recipe, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]))
    torch.manual_seed(0)
    on_cpu = trainer.TransferTrainer.build_model(config).eval()
    on_gpu = copy.deepcopy(on_cpu).to(CUDA, memory_format=layout)
    torch.backends.cudnn.allow_tf32 = False
    images = on_cpu.preprocess_image([picture(0)]).tensor
    with torch.no_grad():
        expected, found = on_cpu.backbone(images), on_gpu.backbone(images.to(CUDA))
    for name, features in expected.items():
        torch.testing.assert_close(found[name].cpu(), features, rtol=1e-3, atol=1e-3 * features.abs().max().item())


@pytest.fixture
def train(tiny_overrides, tmp_path):
    def call(folder, *pairs, options=()):
        fixed = ["--config", "shapes_R18_FPN", "--num-gpus", "1", "--output", str(tmp_path / folder)]
        train_net.main([*fixed, *options, *tiny_overrides, "MODEL.DEVICE", "cuda", *map(str, pairs)])
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.json").read_text().splitlines()]
        return [line["total_loss"] for line in lines if "total_loss" in line], tmp_path / folder

    return call


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_a_run_trains_evaluates_and_resumes(train, precision):
    pairs = ("SOLVER.PRECISION", precision, "SOLVER.CHECKPOINT_PERIOD", 1, "LOG.PICTURES", 1)
    losses, folder = train("run", *pairs)
    assert all(loss > 0 for loss in losses)
    assert {"bbox", "segm"} <= json.loads((folder / "results.json").read_text())["results"].keys()
    train("run", "SOLVER.PRECISION", precision, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", "(1,)", options=["--resume"])
    assert json.loads((folder / "results.json").read_text())["iterations"] == 3


def test_a_gpu_without_enough_memory_is_one_line(train, monkeypatch):
    from foundation.errors import UserError

    def fail(*_):
        torch.empty(2**50, dtype=torch.uint8, device=CUDA)

    monkeypatch.setattr(trainer.TransferTrainer, "run_step", fail)
    with pytest.raises(UserError, match="the GPU is out of memory: "):
        train("run")
