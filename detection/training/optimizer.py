"""The optimizer of a config: SGD or AdamW with Detectron2's groups of parameters, and rates that decay by layer."""

from typing import Any

import torch
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import build_optimizer, maybe_add_gradient_clipping
from fvcore.common.config import CfgNode

from detection.training.weights import STAGES, backbone_names


def build(config: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Detectron2's SGD, or AdamW; the first group has the rate of the layers that do not come from the weights."""
    solver = config.SOLVER
    if solver.OPTIMIZER == "SGD" and solver.LAYER_DECAY == 1:
        optimizer: torch.optim.Optimizer = build_optimizer(config, model)
        return optimizer
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    if solver.LAYER_DECAY != 1:
        groups = _decay_by_layer(groups, model, solver.LAYER_DECAY)
    sgd = solver.OPTIMIZER == "SGD"
    momentum = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV} if sgd else {}
    clipped = maybe_add_gradient_clipping(config, torch.optim.SGD if sgd else torch.optim.AdamW)
    return clipped(groups, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, **momentum)


def _decay_by_layer(groups: list[dict[str, Any]], model: torch.nn.Module, decay: float) -> list[dict[str, Any]]:
    """The groups, divided by stage of the ResNet, those with the highest rates first.

    The rate of res5 is multiplied by `decay`, that of res4 by its square, and so on to the stem, as for the layers of a
    transformer in Bao et al. 2022 (BEiT), appendix H. What the weights do not fill has the full rate.
    """
    parameters = dict(model.named_parameters())
    depth = {
        parameters[name]: len(STAGES) - STAGES.index(f"{short.partition('.')[0]}.")
        for short, name in backbone_names(parameters)
    }
    divided: dict[tuple[int, int], dict[str, Any]] = {}
    for number, group in enumerate(groups):
        for parameter in group["params"]:
            layers = depth.get(parameter, 0)
            entry = divided.setdefault((layers, number), {**group, "lr": group["lr"] * decay**layers, "params": []})
            entry["params"].append(parameter)
    return [divided[key] for key in sorted(divided)]
