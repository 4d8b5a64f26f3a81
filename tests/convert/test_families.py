"""A file of every family as its own repository writes it: the encoder that comes out is the one that went in."""

import pytest

from tests.convert import checkpoints
from tests.convert.conftest import assert_holds, sidecar_of, values_of

FAMILIES = [
    (checkpoints.own, "CorInfoMax (this project), pretraining", "model:encoder", "q"),
    (checkpoints.own_finetuned, "CorInfoMax (this project), fine-tuned", "model:encoder", "q"),
    (checkpoints.torchvision, "torchvision names, flat", "top", "q"),
    (checkpoints.moco, "MoCo v1/v2, PCL", "state_dict:encoder_q", "q"),
    (checkpoints.moco_v2, "MoCo v1/v2, PCL", "state_dict:encoder_q", "q"),
    (checkpoints.moco_v3, "MoCo v3", "state_dict:base_encoder", "q"),
    (checkpoints.simsiam, "SimSiam", "state_dict:encoder", "q"),
    (checkpoints.barlow_full, "Barlow Twins, full", "model:backbone", "q"),
    (checkpoints.vicreg_full, "VICReg, full", "model:backbone", "q"),
    (checkpoints.vicregl, "VICRegL", "model:backbone", "q"),
    (checkpoints.swav_release, "SwAV, DeepCluster v2 or SeLa v2", "top", "q"),
    (checkpoints.swav_training, "SwAV, DeepCluster v2 or SeLa v2", "state_dict", "q"),
    (checkpoints.dino_full, "DINO, full", "teacher:backbone", "k"),
    (checkpoints.pycontrast, "InsDis, MoCo or InfoMin (PyContrast)", "model:encoder", "q"),
    (checkpoints.pirl, "PIRL or InfoMin (PyContrast, jigsaw)", "model:encoder", "q"),
    (checkpoints.pixpro, "PixPro", "model:encoder", "q"),
    (checkpoints.slotcon, "SlotCon", "model:encoder_k", "k"),
    (checkpoints.densecl_full, "DenseCL, full", "state_dict:backbone", "q"),
    (checkpoints.mmselfsup_moco, "mmselfsup / OpenSelfSup, MoCo", "state_dict:backbone", "q"),
    (checkpoints.mmselfsup_byol, "mmselfsup / OpenSelfSup, BYOL", "state_dict:backbone", "q"),
    (checkpoints.mmselfsup_simclr, "mmselfsup / OpenSelfSup", "state_dict:backbone", "q"),
    (checkpoints.openselfsup_extracted, "mmselfsup / OpenSelfSup, extracted", "state_dict", "q"),
    (checkpoints.solo, "solo-learn", "state_dict:backbone", "q"),
    (checkpoints.solo_old, "solo-learn", "state_dict:encoder", "q"),
    (checkpoints.lightly_example, "lightly", "backbone", "q"),
    (checkpoints.lightly_lightning, "lightly", "state_dict:backbone", "q"),
    (checkpoints.lightly_moco_benchmark, "lightly benchmark", "state_dict:backbone", "q"),
    (checkpoints.lightly_dino_benchmark, "lightly benchmark", "state_dict:backbone", "q"),
    (checkpoints.lightly_train, "lightly-train", "state_dict:teacher_embedding_model.wrapped_model._model", "k"),
    (checkpoints.vissl, "VISSL", "classy_state_dict/base_model/model/trunk:_feature_blocks", "q"),
    (checkpoints.vissl_converted, "VISSL", "model_state_dict:_feature_blocks", "q"),
    (checkpoints.corinfomax_full, "CorInfoMax (authors), full", "model_state_dict:backbone", "q"),
    (checkpoints.corinfomax_backbone, "torchvision names, flat", "top", "q"),
    (checkpoints.vicreg_finetuned, "VICReg, CorInfoMax or Barlow Twins, fine-tuned", "model:0", "q"),
    (checkpoints.barlow_finetuned, "torchvision names, wrapped", "model", "q"),
    (checkpoints.compiled_fsdp, "VICReg, full", "model:backbone", "q"),
    (checkpoints.timm_training, "timm training checkpoint", "state_dict_ema", "q"),
    (checkpoints.whole_module, "torchvision names, flat", "top", "q"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "family", "branch", "side"), FAMILIES, ids=[row[0].__name__ for row in FAMILIES])
def test_family(build, family, branch, side, query, key, convert):
    output = convert(build(query, key))
    assert_holds(output, values_of(query if side == "q" else key))
    sidecar = sidecar_of(output)
    assert (sidecar["family"], sidecar["branch"], sidecar["depth"], sidecar["tensors"]) == (family, branch, 50, 265)
