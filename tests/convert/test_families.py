"""A file of every family as its own repository writes it: the encoder that comes out is the one that went in."""

import argparse
import json
import pickle
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from cli.errors import UserError
from tests.convert.conftest import assert_holds, encoder_of, tiny_resnet, values_of

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
        "DATA": {"MEAN": [0.5, 0.4, 0.3], "STD": [0.2, 0.2, 0.1]},
    }
    objective = {"mean": torch.zeros(2, 4, dtype=torch.float64), "covariance": torch.eye(4, dtype=torch.float64)}
    position = {"epoch": 1, "step": 4}
    return {"format": "corinfomax-pretrain", "version": 1, "model": model, "objective": objective, "optimizer": OPTIMIZER, "position": position, "config": config}  # fmt: skip


def own_finetuned(q, k):
    return {
        "format": "corinfomax-finetune",
        "version": 1,
        "model": under("encoder.", encoder_of(q)) | under("head.", LINEAR),
        "config": {},
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
    return {"opt": NAMESPACE, "model": state, "model_ema": momentum, "contrast": {"memory": torch.ones(9, 4)}, "optimizer": OPTIMIZER, "epoch": 800}  # fmt: skip


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


def lightly_train_checkpoint(q, k):
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
    return {"epoch": 100, "model_state_dict": state, "optimizer_state_dict": OPTIMIZER, "parameters_dict": {"la_R": 0.1}, "loss": torch.tensor(1.0)}  # fmt: skip


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


FAMILIES = [
    (own, "CorInfoMax (this project), pretraining", "model:encoder", "q"),
    (own_finetuned, "CorInfoMax (this project), fine-tuned", "model:encoder", "q"),
    (torchvision, "torchvision names, flat", "top", "q"),
    (moco, "MoCo v1/v2, PCL", "state_dict:encoder_q", "q"),
    (moco_v2, "MoCo v1/v2, PCL", "state_dict:encoder_q", "q"),
    (moco_v3, "MoCo v3", "state_dict:base_encoder", "q"),
    (simsiam, "SimSiam", "state_dict:encoder", "q"),
    (barlow_full, "Barlow Twins, full", "model:backbone", "q"),
    (vicreg_full, "VICReg, full", "model:backbone", "q"),
    (vicregl, "VICRegL", "model:backbone", "q"),
    (swav_release, "SwAV, DeepCluster v2 or SeLa v2", "top", "q"),
    (swav_training, "SwAV, DeepCluster v2 or SeLa v2", "state_dict", "q"),
    (dino_full, "DINO, full", "teacher:backbone", "k"),
    (pycontrast, "InsDis, MoCo or InfoMin (PyContrast)", "model:encoder", "q"),
    (pirl, "PIRL or InfoMin (PyContrast, jigsaw)", "model:encoder", "q"),
    (pixpro, "PixPro", "model:encoder", "q"),
    (slotcon, "SlotCon", "model:encoder_k", "k"),
    (densecl_full, "DenseCL, full", "state_dict:backbone", "q"),
    (mmselfsup_moco, "mmselfsup / OpenSelfSup, MoCo", "state_dict:backbone", "q"),
    (mmselfsup_byol, "mmselfsup / OpenSelfSup, BYOL", "state_dict:backbone", "q"),
    (mmselfsup_simclr, "mmselfsup / OpenSelfSup", "state_dict:backbone", "q"),
    (openselfsup_extracted, "mmselfsup / OpenSelfSup, extracted", "state_dict", "q"),
    (solo, "solo-learn", "state_dict:backbone", "q"),
    (solo_old, "solo-learn", "state_dict:encoder", "q"),
    (lightly_example, "lightly", "backbone", "q"),
    (lightly_lightning, "lightly", "state_dict:backbone", "q"),
    (lightly_moco_benchmark, "lightly benchmark", "state_dict:backbone", "q"),
    (lightly_dino_benchmark, "lightly benchmark", "state_dict:backbone", "q"),
    (lightly_train_checkpoint, "lightly-train", "state_dict:teacher_embedding_model.wrapped_model._model", "k"),
    (vissl, "VISSL", "classy_state_dict/base_model/model/trunk:_feature_blocks", "q"),
    (vissl_converted, "VISSL", "model_state_dict:_feature_blocks", "q"),
    (corinfomax_full, "CorInfoMax (authors), full", "model_state_dict:backbone", "q"),
    (corinfomax_backbone, "torchvision names, flat", "top", "q"),
    (vicreg_finetuned, "VICReg, CorInfoMax or Barlow Twins, fine-tuned", "model:0", "q"),
    (barlow_finetuned, "torchvision names, wrapped", "model", "q"),
    (compiled_fsdp, "VICReg, full", "model:backbone", "q"),
    (timm_training, "timm training checkpoint", "state_dict_ema", "q"),
    (whole_module, "torchvision names, flat", "top", "q"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "family", "branch", "side"), FAMILIES, ids=[row[0].__name__ for row in FAMILIES])
def test_family(build, family, branch, side, query, key, convert):
    output = convert(build(query, key))
    assert_holds(output, values_of(query if side == "q" else key))
    note = json.loads(output.with_suffix(".json").read_text())
    assert (note["family"], note["branch"], note["depth"], note["tensors"]) == (family, branch, 50, 265)


def hugging_face(network, prefix):
    """Names of `transformers.ResNetModel`."""
    state = OrderedDict()
    for name, value in encoder_of(network).items():
        parts = name.split(".")
        if parts[0] in ("conv1", "bn1"):
            kind = {"conv1": "convolution", "bn1": "normalization"}[parts[0]]
            state[f"{prefix}embedder.embedder.{kind}.{parts[1]}"] = value
            continue
        root = f"{prefix}encoder.stages.{int(parts[0][-1]) - 1}.layers.{parts[1]}"
        if parts[2] == "downsample":
            state[f"{root}.shortcut.{('convolution', 'normalization')[int(parts[3])]}.{parts[4]}"] = value
        else:
            kind = "convolution" if parts[2].startswith("conv") else "normalization"
            state[f"{root}.layer.{int(parts[2][-1]) - 1}.{kind}.{parts[3]}"] = value
    return state


def simclr_v2(network):
    """Names of Separius' SimCLRv2-Pytorch without selective kernels."""
    state = OrderedDict()
    for name, value in encoder_of(network).items():
        parts = name.split(".")
        if parts[0] in ("conv1", "bn1"):
            state["net.0.0.weight" if parts[0] == "conv1" else f"net.0.1.0.{parts[1]}"] = value
            continue
        root = f"net.{parts[0][-1]}.blocks.{parts[1]}"
        if parts[2] == "downsample":
            state[f"{root}.projection." + ("shortcut.weight" if parts[3] == "0" else f"bn.0.{parts[4]}")] = value
        else:
            position = 2 * (int(parts[2][-1]) - 1) + parts[2].startswith("bn")
            state[f"{root}.net.{position}." + (parts[3] if parts[2].startswith("conv") else f"0.{parts[3]}")] = value
    return state


def haiku(network):
    """Parameters and state of DeepMind's BYOL network, in haiku's layout."""
    parameters, state = {}, {}
    for name, value in encoder_of(network).items():
        parts = name.split(".")
        if parts[0] in ("conv1", "bn1"):
            module = f"res_net50/~/initial_{'conv' if parts[0] == 'conv1' else 'batchnorm'}"
        else:
            module = f"res_net50/~/block_group_{int(parts[0][-1]) - 1}/~/block_{parts[1]}/~/"
            if parts[2] == "downsample":
                module += f"shortcut_{('conv', 'batchnorm')[int(parts[3])]}"
            else:
                module += f"{'conv' if parts[2].startswith('conv') else 'batchnorm'}_{int(parts[2][-1]) - 1}"
        array = value.numpy()
        if "conv" in module.split("/")[-1]:
            parameters[module] = {"w": np.ascontiguousarray(array.transpose(2, 3, 1, 0))}
        elif parts[-1] in ("weight", "bias"):
            part = {"weight": "scale", "bias": "offset"}[parts[-1]]
            parameters.setdefault(module, {})[part] = array.reshape(1, 1, 1, -1)
        elif parts[-1].startswith("running"):
            average = {
                "average": array.reshape(1, 1, 1, -1),
                "hidden": array.reshape(1, 1, 1, -1),
                "counter": np.int32(7),
            }
            state[f"{module}/~/{parts[-1].removeprefix('running_')}_ema"] = average
    parameters["projector/linear"] = {"w": np.ones((4, 9), np.float32), "b": np.ones(9, np.float32)}
    parameters["classifier"] = {"w": np.ones((256, 10), np.float32), "b": np.ones(10, np.float32)}
    state["projector/batch_norm/~/mean_ema"] = {"average": np.ones((1, 9), np.float32)}
    return parameters, state


def caffe2(network):
    """Blobs of a Detectron 1 model: scale and bias for each normalisation, no statistics."""
    blobs = {"fc1000_w": np.ones((10, 256), np.float32), "fc1000_b": np.ones(10, np.float32)}
    branches = {"1": "2a", "2": "2b", "3": "2c"}
    for name, value in encoder_of(network).items():
        parts = name.split(".")
        suffix = {"weight": "s", "bias": "b"}.get(parts[-1])
        if suffix is None:
            continue
        if parts[0] in ("conv1", "bn1"):
            blobs["conv1_w" if parts[0] == "conv1" else f"res_conv1_bn_{suffix}"] = value.numpy()
            continue
        branch = "1" if parts[2] == "downsample" else branches[parts[2][-1]]
        kind = "w" if value.dim() == 4 else f"bn_{suffix}"
        blobs[f"res{int(parts[0][-1]) + 1}_{parts[1]}_branch{branch}_{kind}"] = value.numpy()
    return blobs


def test_hugging_face(query, convert):
    output = convert(hugging_face(query, "resnet.") | under("classifier.1.", LINEAR))
    assert_holds(output, values_of(query))
    assert note_of(output)["family"] == "Hugging Face transformers"


def test_simclr_v2_takes_unnormalised_images(query, convert):
    output = convert({"resnet": simclr_v2(query) | under("fc.", LINEAR), "head": mlp("layers.", 0, 3)})
    assert_holds(output, values_of(query))
    note = note_of(output)
    assert (note["family"], note["branch"]) == ("SimCLR v2 (PyTorch)", "resnet")
    assert (note["pixel_mean"], note["pixel_std"]) == ([0.0] * 3, [255.0] * 3)


def test_simclr_v2_with_selective_kernels_is_refused(query, convert):
    state = simclr_v2(query)
    state["net.1.blocks.0.net.2.main_conv.0.weight"] = state.pop("net.1.blocks.0.net.2.weight")
    with pytest.raises(UserError, match="selective-kernel"):
        convert({"resnet": state, "head": {}})


ByolState = namedtuple(
    "_ByolExperimentState", ["online_params", "target_params", "online_state", "target_state", "opt_state"]
)


def test_byol_from_deepmind(query, key, convert, foreign_class):
    """Pickled with protocol 2, parameters in haiku's mapping type, beside optimizer state of a class of its own."""
    mapping = foreign_class("haiku._src.data_structures", "FlatMapping")
    state_class = foreign_class("byol.byol_experiment", "_ByolExperimentState", ByolState)
    online, target = haiku(query), haiku(key)
    optimizer = foreign_class("byol.utils.optimizers", "LarsState")({"mu": {"a": np.ones(3)}})
    experiment = state_class(mapping(online[0]), mapping(target[0]), mapping(online[1]), mapping(target[1]), optimizer)
    content = {"experiment_state": experiment, "step": np.int64(5), "rng": np.zeros(2, np.uint32)}
    data = pickle.dumps(content, protocol=2)
    output = convert(data, name="pretrain_res50x1.pkl")
    assert_holds(output, values_of(query))
    note = note_of(output)
    assert note["family"] == "BYOL (DeepMind)"
    assert "SAME padding" in note["notes"][0]
    assert_holds(convert(data, "--branch", "target", name="b.pkl", output="target.pkl"), values_of(key))


def test_caffe2_gets_its_own_statistics_and_strides(query, convert):
    output = convert(pickle.dumps({"blobs": caffe2(query)}, protocol=2), name="R-50.pkl")
    expected = values_of(query)
    for name in expected:
        if name.endswith("running_mean"):
            expected[name] = np.zeros_like(expected[name])
        elif name.endswith("running_var"):
            expected[name] = np.full_like(expected[name], 1 - 1e-5)
    assert_holds(output, expected)
    note = note_of(output)
    assert (note["format"], note["stride_in_1x1"]) == ("BGR", True)
    assert (note["pixel_mean"], note["pixel_std"]) == ([103.53, 116.28, 123.675], [1.0, 1.0, 1.0])


def test_simclr_v1_is_told_by_what_its_first_layer_has_seen(convert):
    """SimCLR v1's files have torchvision's names; only their statistics tell that images were not normalised."""
    network = tiny_resnet(3, width=16)
    kernel = network.conv1.weight.detach().sum(dim=(2, 3))
    network.bn1.running_mean.copy_(kernel @ torch.tensor([0.47, 0.44, 0.40]) + 0.005 * torch.randn(16))
    note = note_of(convert({"state_dict": network.state_dict()}, name="resnet50-1x.pth"))
    assert (note["pixel_mean"], note["pixel_std"]) == ([0.0] * 3, [255.0] * 3)
    assert "measured" in note["pixel_origin"]
    network.bn1.running_mean.copy_(kernel @ torch.tensor([0.05, -0.03, 0.02]))
    note = note_of(convert({"state_dict": network.state_dict()}, "--overwrite"))
    assert note["pixel_mean"] == [123.675, 116.28, 103.53]


def note_of(output):
    return json.loads(output.with_suffix(".json").read_text())


def test_own_statistics_and_account(query, key, convert):
    note = note_of(convert(own(query, key)))
    assert note["pixel_mean"] == [127.5, 102.0, 76.5]
    assert note["pixel_std"] == [51.0, 51.0, 25.5]
    assert (note["format"], note["stride_in_1x1"], note["stem"]) == ("RGB", False, "imagenet")
    assert note["dropped"] == {
        "num_batches_tracked": 53,
        "objective (another table)": 2,
        "optimizer (another table)": 1,
        "projector": 4,
    }


def test_branch_takes_the_other_encoder(query, key, convert):
    assert_holds(convert(moco(query, key), "--branch", "encoder_k"), values_of(key))
    assert_holds(convert(dino_full(query, key), "--branch", "student", output="b.pkl"), values_of(query))
    with pytest.raises(UserError, match="it has: model:encoder_k, model:encoder_q"):
        convert(slotcon(query, key), "--branch", "backbone", output="c.pkl")


def test_two_equal_candidates_need_a_choice(query, key, convert):
    content = under("left.", encoder_of(query)) | under("right.", encoder_of(key))
    with pytest.raises(UserError, match="several encoders"):
        convert(content)
    assert_holds(convert(content, "--branch", "right"), values_of(key))
    twice = under("left.", encoder_of(query)) | under("right.", encoder_of(query))
    assert_holds(convert(twice, output="twice.pkl"), values_of(query))


def test_unknown_tensors_are_an_error_until_dropped(query, convert):
    content = under("backbone.", encoder_of(query)) | {"mystery.weight": torch.ones(3)}
    with pytest.raises(UserError, match=r"mystery\.weight.*--drop"):
        convert(content)
    output = convert(content, "--drop", "mystery")
    assert note_of(output)["dropped"]["mystery"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "stream"])
def test_other_number_formats_become_float32(dtype, legacy, query, convert, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in encoder_of(query).items() if tensor.is_floating_point()}
    torch.save(state, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=not legacy)
    assert_holds(convert(None), {name: tensor.float().numpy() for name, tensor in state.items()})


def test_transposed_and_shared_storages(query, convert):
    """Channels-last kernels have other strides, and a flat buffer may hold every parameter."""
    state = encoder_of(query.to(memory_format=torch.channels_last))
    names = [name for name in state if state[name].dtype == torch.float32]
    flat = torch.cat([state[name].flatten() for name in names])
    views = dict(zip(names, flat.split([state[name].numel() for name in names]), strict=True))
    shared = {name: views[name].view(state[name].shape) for name in names}
    query.to(memory_format=torch.contiguous_format)
    assert_holds(convert(state), values_of(query))
    assert_holds(convert(shared, "--overwrite"), values_of(query))
