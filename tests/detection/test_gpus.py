"""What a GPU user meets: the choice of the device, memory that runs out, the way of a run's files between machines."""

import pytest
import torch

pytest.importorskip("detectron2")

from detection import config, train_net
from detection.training import checkpoints, prepare, trainer
from foundation.errors import UserError
from foundation.signals import StopRequest


def test_a_device_is_not_chosen_by_its_number():
    # It would silently have been the CPU.
    with pytest.raises(UserError, match=r"MODEL\.DEVICE must be cuda or cpu, not 'cuda:1'; CUDA_VISIBLE_DEVICES"):
        prepare.configure(train_net.parse(["--config", "coco_R50_C4", "MODEL.DEVICE", "cuda:1"]))


@pytest.mark.parametrize(
    ("batch", "passes", "advice"),
    [
        (16, 1, r"raise SOLVER.ACCUMULATION \(now 1\)"),
        (16, 8, "a pass has one image; lower INPUT.MIN_SIZE_TRAIN"),
    ],
)
def test_memory_that_runs_out_is_said_with_what_to_do(batch, passes, advice, monkeypatch, tmp_path):
    class Stub:
        resume_or_load = staticmethod(lambda resume: None)

        def train(self):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    chosen = config.load("coco_R50_C4", ["SOLVER.IMS_PER_BATCH", str(batch), "SOLVER.ACCUMULATION", str(passes)])
    chosen.OUTPUT_DIR = str(tmp_path)
    monkeypatch.setattr(trainer, "_prepare", lambda *_: None)
    monkeypatch.setattr(trainer.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(trainer, "TransferTrainer", lambda *_: Stub())
    with pytest.raises(UserError, match=rf"is out of memory: {advice}.* \(CUDA out of memory\."):
        trainer.train(chosen, "coco_R50_C4", resume=False, request=StopRequest())


def test_a_checkpoint_of_a_gpu_is_read_without_one(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 3)
    with monkeypatch.context() as patch:
        patch.setattr("torch.serialization.location_tag", lambda storage: "cuda:3")
        checkpoints.write(tmp_path / "model_final.pth", {"model": model.state_dict()})
    (tmp_path / "model_final.sha256").unlink()
    assert checkpoints.damage(tmp_path / "model_final.pth") is None
    other = torch.nn.Linear(2, 3)
    checkpoints.SafeCheckpointer(other, str(tmp_path), keep=0).load(str(tmp_path / "model_final.pth"))
    assert torch.equal(other.weight, model.weight)
