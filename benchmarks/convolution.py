"""Convolutions on small maps as matrix products beside PyTorch's, by layer and in whole encoders, on a CPU.

    python benchmarks/convolution.py            layers of a ResNet-18, and encoders, in bfloat16
    python benchmarks/convolution.py --float32

Each side is a forward and a backward pass. "Pixels" is the side of the layer's input map.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
import torchvision
from timing import alternate, build_parser, print_table, ratio, start
from torch import nn

from foundation.errors import run
from pretrain import convolution
from pretrain.encoder import build_encoder

# Batch, input channels, output channels, kernel, stride, pixels: what the last stages of a ResNet-18 see.
LAYERS = [
    (256, 512, 512, 3, 1, 1),
    (256, 256, 512, 3, 2, 2),
    (256, 512, 512, 3, 1, 2),
    (256, 256, 512, 3, 2, 3),
    (256, 256, 512, 1, 2, 3),
    (256, 256, 256, 3, 1, 2),
    (256, 256, 256, 3, 1, 3),
    (256, 128, 256, 3, 2, 5),
    (256, 128, 128, 3, 1, 4),
    (256, 128, 128, 3, 1, 5),
]
ENCODERS = [("resnet18", 256, 32), ("resnet18", 256, 40), ("resnet18", 128, 48), ("resnet50", 64, 48)]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = build_parser("Convolutions on small maps.", threads=1, rounds=9, gpu=False)
    parser.add_argument("--float32", action="store_true", help="without autocast to bfloat16")
    args = parser.parse_args(argv)
    start(args)
    layers = [(2, 8, 8, 3, 1, 2)] if args.quick else LAYERS
    encoders = [("resnet18", 2, 32)] if args.quick else ENCODERS
    header = ["batch", "channels", "kernel, stride", "pixels", "PyTorch, ms", "products, ms", "PyTorch / products"]
    print_table(header, (compare_layer(*layer, args) for layer in layers))
    print()
    print_table(
        ["encoder", "batch", "view", "PyTorch, ms", "products, ms", "PyTorch / products"],
        (compare_encoder(*encoder, args) for encoder in encoders),
    )


def compare_layer(
    batch: int, channels: int, out: int, kernel: int, stride: int, pixels: int, args: argparse.Namespace
) -> list[str]:
    """A row: one layer."""
    layer = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False).to(memory_format=torch.channels_last)
    maps = torch.randn(batch, channels, pixels, pixels, dtype=torch.float32 if args.float32 else torch.bfloat16)
    limit, convolution.MAX_PIXELS = convolution.MAX_PIXELS, 100  # also where the layer would leave it to PyTorch
    times = compare(layer, convolution.SmallMapConv2d(layer), maps.requires_grad_(), args)
    convolution.MAX_PIXELS = limit
    return [str(batch), f"{channels} to {out}", f"{kernel} x {kernel}, {stride}", str(pixels), *times]


def compare_encoder(name: str, batch: int, size: int, args: argparse.Namespace) -> list[str]:
    """A row: a whole encoder."""
    encoder = build_encoder(name, "imagenet").to(memory_format=torch.channels_last)
    reference = getattr(torchvision.models, name)()
    reference.fc = nn.Identity()
    times = compare(reference.to(memory_format=torch.channels_last), encoder, torch.randn(batch, 3, size, size), args)
    return [name, str(batch), str(size), *times]


def compare(reference: nn.Module, products: nn.Module, images: torch.Tensor, args: argparse.Namespace) -> list[str]:
    """Milliseconds of both, and their ratio."""
    images = images.detach().contiguous(memory_format=torch.channels_last).requires_grad_(images.requires_grad)

    def pass_through(network: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
            output = network(images)
        output.backward(torch.ones_like(output))

    rounds = 1 if args.quick else args.rounds
    seconds = alternate([lambda: pass_through(reference), lambda: pass_through(products)], rounds, torch.device("cpu"))
    medians = 1000 * np.median(seconds, axis=0)
    return [*(f"{value:.1f}" for value in medians), ratio(seconds, 1, 0)]


if __name__ == "__main__":
    run(main)
