"""Networks of the tables that `train.py` does not offer, by `model._target_=small_networks.NAME`."""

from collections.abc import Sequence

from torch import nn


def three_convolutions(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """Three convolutions of 32, 64 and 128 channels that halve the image, each with batch norm and ReLU, and a linear layer.

    93,728 weights can be sparse on Fashion-MNIST.

    Args:
        input_shape: (channels, height, width) of the images.
        num_classes: the number of outputs.
    """
    layers: list[nn.Module] = []
    inputs = input_shape[0]
    for width in (32, 64, 128):
        layers += [nn.Conv2d(inputs, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))
