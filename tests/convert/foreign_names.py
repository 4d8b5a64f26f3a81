"""An encoder's tensors as networks name them that do not follow torchvision."""

from collections import OrderedDict

import numpy as np

from tests.convert.conftest import encoder_of


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
