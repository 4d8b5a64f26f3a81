"""Checkpoints of every family, as its own repository writes them, from a query and a key encoder."""

import argparse
from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from tests.convert.conftest import encoder_of

LINEAR = {"weight": torch.ones(4, 256), "bias": torch.ones(4)}


def under(prefix, tensors):
    return OrderedDict((f"{prefix}{name}", tensor) for name, tensor in tensors.items())


def mlp(prefix, *positions):
    """The tensors of a projector."""
    made = OrderedDict()
    for position in positions:
        made |= under(f"{prefix}{position}.", LINEAR)
    return made


NAMESPACE = argparse.Namespace(arch="resnet50", lr=0.3, nested=argparse.Namespace(gpus=[0, 1]))
LIGHTNING = {
    "epoch": 3,
    "global_step": 10,
    "pytorch-lightning_version": "1.5.0",
    "callbacks": {},
    "hyper_parameters": {"lr": 0.1},
}
MMCV = {"meta": {"epoch": 200, "mmcv_version": "1.3.9", "config": "model = dict(type='MoCo')"}}
OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def own(q, k):
    model = under("encoder.", encoder_of(q)) | mlp("projector.", 0, 3)
    config = {
        "ENCODER": {"NAME": "resnet50", "STEM": "imagenet"},
        "OBJECTIVE": {"NAME": "corinfomax"},
        "DATA": {"MEAN": [0.5, 0.4, 0.3], "STD": [0.2, 0.2, 0.1]},
    }
    objective = {"mean": torch.zeros(2, 4, dtype=torch.float64), "covariance": torch.eye(4, dtype=torch.float64)}
    position = {"epoch": 1, "step": 4}
    content = {"format": "corinfomax-pretrain", "version": 1, "model": model, "objective": objective}
    return {**content, "optimizer": OPTIMIZER, "position": position, "config": config}


def own_finetuned(q, k):
    return {
        "format": "corinfomax-finetune",
        "version": 1,
        "model": under("encoder.", encoder_of(q)) | under("head.", LINEAR),
        "config": {},
        "trained_by": "supervised",
    }


def torchvision(q, k):
    return q.state_dict()


def moco(q, k):
    state = under("module.encoder_q.", q.state_dict()) | under("module.encoder_k.", k.state_dict())
    state |= {"module.queue": torch.ones(4, 9), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": OPTIMIZER}


def moco_v2(q, k):
    state = under("module.encoder_q.", encoder_of(q)) | mlp("module.encoder_q.fc.", 0, 2)
    state |= under("module.encoder_k.", encoder_of(k)) | mlp("module.encoder_k.fc.", 0, 2)
    state |= {"module.queue": torch.ones(4, 9), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": OPTIMIZER}


def moco_v3(q, k):
    state = under("module.base_encoder.", encoder_of(q)) | mlp("module.base_encoder.fc.", 0, 3, 6)
    state |= under("module.momentum_encoder.", encoder_of(k)) | mlp("module.momentum_encoder.fc.", 0, 3, 6)
    return {
        "epoch": 1000,
        "arch": "resnet50",
        "state_dict": state | mlp("module.predictor.", 0, 3),
        "scaler": {"scale": 1.0},
    }


def simsiam(q, k):
    state = (
        under("module.encoder.", encoder_of(q)) | mlp("module.encoder.fc.", 0, 3, 6) | mlp("module.predictor.", 0, 3)
    )
    return {"epoch": 100, "arch": "resnet50", "state_dict": state, "optimizer": OPTIMIZER}


def barlow_full(q, k):
    state = under("module.backbone.", encoder_of(q)) | mlp("module.projector.", 0, 3, 6)
    state |= {"module.bn.running_mean": torch.zeros(4), "module.bn.running_var": torch.ones(4)}
    return {"epoch": 1000, "model": state | {"module.bn.num_batches_tracked": torch.tensor(5)}, "optimizer": OPTIMIZER}


def vicreg_full(q, k):
    return {
        "epoch": 1000,
        "model": under("module.backbone.", encoder_of(q)) | mlp("module.projector.", 0, 1, 3),
        "optimizer": OPTIMIZER,
    }


def vicregl(q, k):
    state = (
        under("module.backbone.", encoder_of(q)) | mlp("module.maps_projector.", 0, 3) | mlp("module.projector.", 0, 3)
    )
    return {"epoch": 300, "model": state | under("module.classifier.", LINEAR), "optimizer": OPTIMIZER}


def swav_release(q, k):
    return (
        under("module.", encoder_of(q))
        | mlp("module.projection_head.", 0, 3)
        | {"module.prototypes.weight": torch.ones(9, 4)}
    )


def swav_training(q, k):
    state = swav_release(q, k) | {"module.prototypes.prototypes0.weight": torch.ones(9, 4)}
    return {"epoch": 400, "state_dict": state, "optimizer": OPTIMIZER, "amp": {"loss_scaler0": {"loss_scale": 1.0}}}


def dino_full(q, k):
    heads = mlp("module.head.mlp.", 0, 2, 4) | {"module.head.last_layer.weight_g": torch.ones(9, 1)}
    student, teacher = (
        under("module.backbone.", encoder_of(q)) | heads,
        under("module.backbone.", encoder_of(k)) | heads,
    )
    return {
        "student": student,
        "teacher": teacher,
        "epoch": 800,
        "args": NAMESPACE,
        "dino_loss": {"center": torch.ones(1, 9)},
    }


def pycontrast(q, k):
    state = under("module.encoder.", encoder_of(q)) | mlp("module.head.", 0, 2)
    momentum = under("encoder.", encoder_of(k)) | mlp("head.", 0, 2)
    content = {"opt": NAMESPACE, "model": state, "model_ema": momentum, "optimizer": OPTIMIZER, "epoch": 800}
    return {**content, "contrast": {"memory": torch.ones(9, 4)}}


def pirl(q, k):
    state = under("module.encoder.", encoder_of(q)) | mlp("module.head.", 0) | mlp("module.head_jig.fc", "1", "2")
    return {"opt": NAMESPACE, "model": state, "contrast": {"memory": torch.ones(9, 4)}, "epoch": 800}


def pixpro(q, k):
    state = under("module.encoder.", encoder_of(q)) | under("module.encoder_k.", encoder_of(k))
    state |= mlp("module.projector.", "linear1", "linear2") | mlp("module.projector_k.", "linear1", "linear2")
    return {
        "opt": NAMESPACE,
        "model": state | under("module.value_transform.", LINEAR),
        "optimizer": OPTIMIZER,
        "epoch": 100,
    }


def slotcon(q, k):
    state = under("module.encoder_q.", encoder_of(q)) | under("module.encoder_k.", encoder_of(k))
    for side in "qk":
        state |= mlp(f"module.projector_{side}.mlp.", 0, 3) | {
            f"module.grouping_{side}.slot_embed.weight": torch.ones(9, 4)
        }
    state |= mlp("module.predictor_slot.mlp.", 0, 3) | {"module.center": torch.ones(1, 9)}
    return {"args": NAMESPACE, "model": state, "optimizer": OPTIMIZER, "epoch": 200}


def densecl_full(q, k):
    state = under("encoder_q.0.", encoder_of(q)) | mlp("encoder_q.1.mlp.", 0, 2) | under("backbone.", encoder_of(q))
    state |= under("encoder_k.0.", encoder_of(k)) | mlp("encoder_k.1.mlp2.", 0, 2) | mlp("neck.mlp.", 0, 2)
    for queue in ("queue", "queue2"):
        state |= {queue: torch.ones(4, 9), f"{queue}_ptr": torch.zeros(1, dtype=torch.long)}
    return {**MMCV, "state_dict": state, "optimizer": OPTIMIZER}


def mmselfsup_moco(q, k):
    content = densecl_full(q, k)
    content["state_dict"] = {
        name: value for name, value in content["state_dict"].items() if not name.startswith("queue2")
    }
    return content


def mmselfsup_byol(q, k):
    state = (
        under("online_net.0.", encoder_of(q)) | mlp("online_net.1.", "fc0", "fc1") | under("backbone.", encoder_of(q))
    )
    state |= under("target_net.0.", encoder_of(k)) | mlp("target_net.1.", "fc0") | mlp("head.predictor.", "fc0")
    return {**MMCV, "state_dict": state}


def mmselfsup_simclr(q, k):
    return {**MMCV, "state_dict": under("backbone.", encoder_of(q)) | mlp("neck.", "fc0", "fc1")}


def openselfsup_extracted(q, k):
    return {"state_dict": encoder_of(q), "author": "OpenSelfSup"}


def solo(q, k):
    state = (
        under("backbone.", encoder_of(q)) | under("momentum_backbone.", encoder_of(k)) | under("classifier.", LINEAR)
    )
    state |= (
        mlp("projector.", 0, 3)
        | mlp("momentum_projector.", 0, 3)
        | mlp("predictor.", 0, 3)
        | {"queue": torch.ones(4, 9)}
    )
    return {**LIGHTNING, "state_dict": state, "optimizer_states": [OPTIMIZER]}


def solo_old(q, k):
    return {
        **LIGHTNING,
        "state_dict": under("encoder.", encoder_of(q)) | under("classifier.", LINEAR) | mlp("projector.", 0, 3),
    }


def sequential(network):
    """As `nn.Sequential(*list(resnet.children())[:-1])` names them."""
    return nn.Sequential(*list(network.children())[:-1]).state_dict()


def lightly_example(q, k):
    state = under("backbone.", sequential(q)) | under("backbone_momentum.", sequential(k))
    return state | mlp("projection_head.layers.", 0, 3) | mlp("projection_head_momentum.layers.", 0, 3)


def lightly_lightning(q, k):
    return {**LIGHTNING, "state_dict": under("backbone.", sequential(q)) | mlp("projection_head.layers.", 0, 3)}


def lightly_moco_benchmark(q, k):
    state = (
        under("backbone.", encoder_of(q))
        | mlp("projection_head.layers.", 0, 3)
        | under("query_backbone.", encoder_of(k))
    )
    state |= mlp("query_projection_head.layers.", 0, 3) | under("online_classifier.classification_head.", LINEAR)
    return {**LIGHTNING, "state_dict": state | {"criterion.memory_bank.bank": torch.ones(4, 9)}}


def lightly_dino_benchmark(q, k):
    state = (
        under("backbone.", encoder_of(q))
        | mlp("projection_head.layers.", 0, 2)
        | under("student_backbone.", encoder_of(k))
    )
    state |= mlp("student_projection_head.layers.", 0) | {"criterion.center": torch.ones(1, 9)}
    return {**LIGHTNING, "state_dict": state | under("online_classifier.classification_head.", LINEAR)}


def lightly_train(q, k):
    state = under("teacher_embedding_model.wrapped_model._model.", encoder_of(k))
    state |= under("student_embedding_model.wrapped_model._model.", encoder_of(q)) | mlp(
        "student_projection_head.layers.", 0
    )
    return {**LIGHTNING, "state_dict": state, "lightly_train": {"normalize_args": {"mean": [0.485, 0.456, 0.406]}}}


def vissl(q, k):
    trunk = under("_feature_blocks.", encoder_of(q))
    model = {"trunk": trunk, "heads": mlp("0.clf.", 0, 1)}
    base = {"base_model": {"model": model, "loss": {"state": torch.ones(2)}, "meters": {"train": []}}}
    return {"phase_idx": 5, "iteration": 9, "classy_state_dict": base, "type": "consolidated"}


def vissl_converted(q, k):
    return {"model_state_dict": under("_feature_blocks.", encoder_of(q))}


def corinfomax_full(q, k):
    state = under("backbone.", encoder_of(q)) | mlp("projector.", 0, 3, 6)
    content = {"epoch": 100, "model_state_dict": state, "optimizer_state_dict": OPTIMIZER}
    return {**content, "parameters_dict": {"la_R": 0.1}, "loss": torch.tensor(1.0)}


def corinfomax_backbone(q, k):
    return encoder_of(q)


def vicreg_finetuned(q, k):
    state = under("module.0.", encoder_of(q)) | under("module.1.", LINEAR)
    return {
        "epoch": 20,
        "best_acc": argparse.Namespace(top1=54.8, top5=np.float64(79.4)),
        "model": state,
        "optimizer": OPTIMIZER,
    }


def barlow_finetuned(q, k):
    return {
        "epoch": 20,
        "best_acc": argparse.Namespace(top1=np.float64(55.0)),
        "model": under("module.", q.state_dict()),
    }


def compiled_fsdp(q, k):
    names = {
        name.replace("layer1.0.", "layer1.0._checkpoint_wrapped_module."): value
        for name, value in encoder_of(q).items()
    }
    return {
        "model": under("_orig_mod.module.backbone._fsdp_wrapped_module.", names) | mlp("_orig_mod.module.projector.", 0)
    }


def timm_training(q, k):
    state = {
        "epoch": 1,
        "arch": "resnet50",
        "state_dict": k.state_dict(),
        "state_dict_ema": q.state_dict(),
        "args": NAMESPACE,
        "version": 2,
    }
    return {**state, "metric": 70.0}


def whole_module(q, k):
    return q
