"""Networks of the papers on sparse training, and those of libraries, for images of any shape.

Every builder takes `input_shape` (channels, height, width) and `num_classes` and returns a module from images
[batch, channels, height, width] to logits [batch, num_classes]. The fully connected networks also take features
[batch, d] where `input_shape` is (d,).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_callbacks.methods.all_relu import AllReLU
from sparse_callbacks.tasks.library_models import Shape, timm_classifier, torchvision_classifier
from sparse_callbacks.tasks.model_checks import refuse_mlp

__all__ = [
    "lenet5",
    "lenet5_caffe",
    "lenet_300_100",
    "mlp",
    "resnet20",
    "timm_classifier",
    "torchvision_classifier",
    "wrn_22_2",
]


def mlp(
    input_shape: Shape,
    num_classes: int,
    hidden: Sequence[int] = (256, 256),
    activation: str = "relu",
    dropout: float = 0.0,
    init: str | None = None,
) -> nn.Module:
    """Fully connected layers with an activation, and dropout where there is any, after each hidden one.

    Args:
        input_shape: the shape of one sample, (channels, height, width) or (features,).
        num_classes: the number of outputs.
        hidden: the widths of the hidden layers.
        activation: "relu"; or "all_relu", `AllReLU` with its slope of 0.6.
        dropout: the rate of dropout, in [0, 1).
        init: "xavier_uniform" draws the weights as Glorot and Bengio (2010) did, "he_uniform" as He et al. (2015) did for
            ReLU, both with biases of zero; None leaves torch's own initial values.

    Raises:
        ValueError: an unknown activation or init, a rate out of range, or a layer without neurons.
    """
    refuse_mlp(hidden, activation, dropout, init)
    sizes = [math.prod(input_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU() if activation == "relu" else AllReLU(layer=number)]
        # no module without dropout: names of weights hold its number
        layers += [nn.Dropout(dropout)] if dropout else []
    model = nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))
    if init is not None:
        he = partial(nn.init.kaiming_uniform_, nonlinearity="relu")
        _init_linear(model, he if init == "he_uniform" else nn.init.xavier_uniform_)
    return model


def lenet_300_100(input_shape: Shape, num_classes: int) -> nn.Module:
    """LeNet-300-100 (LeCun et al. 1998): an MLP with hidden layers of 300 and 100."""
    return mlp(input_shape, num_classes, hidden=(300, 100))


def lenet5(input_shape: Shape, num_classes: int) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998), 6-16-120-84 with ReLU and max pooling: 61,706 parameters on MNIST.

    The first convolution pads its input, because the original network took images of 32 x 32. Images below 28 x 28 are
    enlarged (`Enlarge`).
    """
    features = nn.Sequential(
        Enlarge(28),
        nn.Conv2d(input_shape[0], 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    head = [nn.Linear(_feature_count(features, input_shape), 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()]
    return nn.Sequential(*features, *head, nn.Linear(84, num_classes))


def lenet5_caffe(input_shape: Shape, num_classes: int) -> nn.Module:
    """LeNet-5 as in Caffe's examples, 20-50-500: 431,080 parameters on MNIST, the network of the L0 and SNIP papers.

    Images below 28 x 28 are enlarged (`Enlarge`).
    """
    # as in the published file, with no activation between a convolution and its pooling
    features = nn.Sequential(
        Enlarge(28),
        nn.Conv2d(input_shape[0], 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    head = [nn.Linear(_feature_count(features, input_shape), 500), nn.ReLU()]
    return nn.Sequential(*features, *head, nn.Linear(500, num_classes))


def resnet20(input_shape: Shape, num_classes: int) -> nn.Module:
    """ResNet-20 for CIFAR (He et al. 2016, section 4.2) with parameter-free shortcuts: 269,722 parameters."""
    blocks: list[nn.Module] = []
    inputs = 16
    for stage, width in enumerate((16, 32, 64)):
        for block in range(3):
            # the first block of the second and third stage halves height and width
            stride = 2 if stage > 0 and block == 0 else 1
            blocks.append(ResidualBlock(inputs, width, stride))
            inputs = width
    # no biases: the batch norm after each convolution would subtract them
    stem = [nn.Conv2d(input_shape[0], 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
    _init_kaiming(model)
    return model


def wrn_22_2(input_shape: Shape, num_classes: int, dropout: float = 0.3) -> nn.Module:
    """WRN-22-2 as in the CIFAR-10 code of the RigL paper (Zagoruyko and Komodakis 2016; depth 22, width 2).

    Three groups of three pre-activation blocks of width 32, 64 and 128. Where the width changes, the shortcut is a
    1 x 1 convolution of the activated input. Dropout of rate `dropout` lies between the two convolutions of a block.
    """
    blocks: list[nn.Module] = []
    inputs = 16
    for stage, width in enumerate((32, 64, 128)):
        for block in range(3):
            stride = 2 if stage > 0 and block == 0 else 1
            blocks.append(PreActivationBlock(inputs, width, stride, dropout))
            inputs = width
    stem = nn.Conv2d(input_shape[0], 16, 3, padding=1, bias=False)
    tail = [nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_classes)]
    model = nn.Sequential(stem, *blocks, *tail)
    _init_kaiming(model)
    return model


class Enlarge(nn.Module):
    """Bilinear enlargement of small images; images of at least the given size pass unchanged.

    Args:
        least: the smallest height and width, in pixels, that comes out.
    """

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if min(height, width) >= self.least:
            return images
        size = (max(height, self.least), max(width, self.least))
        return functional.interpolate(images, size=size, mode="bilinear", align_corners=False)


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + BN(conv(relu(BN(conv(x)))))), with the parameter-free shortcut "A" of He et al. (2016).

    It takes every `stride`-th row and column and pads the new channels with zeros.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.new_channels = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        shortcut = x[..., :: self.stride, :: self.stride]
        if self.new_channels:
            # half of the zero channels before the old ones, half of them after
            before = self.new_channels // 2
            shortcut = functional.pad(shortcut, (0, 0, 0, 0, before, self.new_channels - before))
        return functional.relu(out + shortcut)


class PreActivationBlock(nn.Module):
    """shortcut + conv(dropout(relu(BN(conv(a))))) with a = relu(BN(x)).

    The shortcut is x, or a 1 x 1 convolution of a where the number of channels changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = functional.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(self.dropout(functional.relu(self.norm2(self.conv1(active)))))
        return out + shortcut


def _feature_count(features: nn.Module, input_shape: Shape) -> int:
    """Number of features that a module with flat outputs makes of one image."""
    with torch.no_grad():
        return int(features(torch.zeros(1, *input_shape)).shape[1])


def _init_kaiming(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _init_linear(model: nn.Module, init: Callable[[Tensor], Tensor]) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            init(module.weight)
            nn.init.zeros_(module.bias)
