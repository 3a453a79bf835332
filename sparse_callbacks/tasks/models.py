"""Networks of the sparse-training papers; each adapts to the shape of the images and the number of classes.

Every builder takes `input_shape` (channels, height, width) and `num_classes` and returns a module from images
[batch, channels, height, width] to logits [batch, num_classes]. The fully connected ones also take features [batch, d].
"""

import difflib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Shape = Sequence[int]


def mlp(input_shape: Shape, num_classes: int, hidden: Sequence[int] = (256, 256), init: str | None = None) -> nn.Module:
    """Fully connected layers with ReLU between them.

    Args:
        input_shape: of one sample, images or (features,).
        num_classes: outputs.
        hidden: widths of the hidden layers.
        init: None is torch's own; "xavier_uniform" draws the weights so (Glorot and Bengio 2010) and zeroes the biases.

    Raises:
        ValueError: an unknown init.
    """
    if init not in (None, "xavier_uniform"):
        raise ValueError(f"model.init={init!r} is not known. Use model.init=xavier_uniform, or null for torch's own.")
    sizes = [_flat(input_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))
    return model if init is None else _xavier(model)


def lenet_300_100(input_shape: Shape, num_classes: int) -> nn.Module:
    """LeNet-300-100 (LeCun et al. 1998): an MLP with hidden layers of 300 and 100."""
    return mlp(input_shape, num_classes, hidden=(300, 100))


def lenet5(input_shape: Shape, num_classes: int) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998), 6-16-120-84 with ReLU and max pooling: 61,706 parameters on MNIST.

    The first convolution is padded, as the original was fed 32 x 32. Images below 28 x 28 are enlarged (`Enlarge`).
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
    head = [nn.Linear(_width(features, input_shape), 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()]
    return nn.Sequential(*features, *head, nn.Linear(84, num_classes))


def lenet5_caffe(input_shape: Shape, num_classes: int) -> nn.Module:
    """LeNet-5 as in Caffe's examples, 20-50-500: 431,080 parameters on MNIST, the network of the L0 and SNIP papers.

    Images below 28 x 28 are enlarged (`Enlarge`).
    """
    features = nn.Sequential(
        Enlarge(28),
        nn.Conv2d(input_shape[0], 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    head = [nn.Linear(_width(features, input_shape), 500), nn.ReLU()]
    return nn.Sequential(*features, *head, nn.Linear(500, num_classes))


def resnet20(input_shape: Shape, num_classes: int) -> nn.Module:
    """ResNet-20 for CIFAR (He et al. 2016, section 4.2) with parameter-free shortcuts: 269,722 parameters."""
    blocks: list[nn.Module] = []
    inputs = 16
    for stage, width in enumerate((16, 32, 64)):
        for block in range(3):
            blocks.append(ResidualBlock(inputs, width, stride=2 if stage > 0 and block == 0 else 1))
            inputs = width
    stem = [nn.Conv2d(input_shape[0], 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
    return _kaiming(model)


def wrn_22_2(input_shape: Shape, num_classes: int, dropout: float = 0.3) -> nn.Module:
    """WRN-22-2 of the RigL paper's CIFAR-10 code (Zagoruyko and Komodakis 2016; pre-activation, depth 22, width 2).

    Three groups of three blocks of width 32, 64 and 128; a 1 x 1 convolution of the activated input is the shortcut
    where the width changes; `dropout` sits between the two convolutions of a block.
    """
    blocks: list[nn.Module] = []
    inputs = 16
    for stage, width in enumerate((32, 64, 128)):
        for block in range(3):
            blocks.append(PreActivationBlock(inputs, width, 2 if stage > 0 and block == 0 else 1, dropout))
            inputs = width
    stem = nn.Conv2d(input_shape[0], 16, 3, padding=1, bias=False)
    tail = [nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_classes)]
    return _kaiming(nn.Sequential(stem, *blocks, *tail))


def torchvision_classifier(input_shape: Shape, num_classes: int, name: str = "resnet18") -> nn.Module:
    """Any classifier of torchvision by name, untrained; its first convolution takes the channels of the data.

    Raises:
        ValueError: an unknown name, or images that the network cannot take.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]
        raise ValueError(
            f"model.name={name!r} is no torchvision classifier. Did you mean {', '.join(close)}? "
            "torchvision.models.list_models(module=torchvision.models) lists all."
        )
    # the auxiliary heads of these two would return tuples, and would count as layers that nobody evaluates
    options: dict[str, Any] = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    if options:
        options["init_weights"] = True
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    if input_shape[0] != 3:
        _take_channels(model, input_shape[0])
    _check_fits(model, name, input_shape)
    return model


class Enlarge(nn.Module):
    """Bilinear enlargement of images whose height or width is below `least` pixels; others pass unchanged."""

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
    """relu(shortcut(x) + BN(conv(relu(BN(conv(x)))))); the shortcut subsamples and pads with zero channels (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        shortcut = x[..., :: self.stride, :: self.stride]
        if self.extra:
            shortcut = functional.pad(shortcut, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return functional.relu(out + shortcut)


class PreActivationBlock(nn.Module):
    """shortcut + conv(dropout(relu(BN(conv(a))))) with a = relu(BN(x)); the shortcut is x, or a 1 x 1 convolution of a."""

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


def _flat(input_shape: Shape) -> int:
    size = 1
    for length in input_shape:
        size *= length
    return size


def _width(features: nn.Module, input_shape: Shape) -> int:
    """Length of the flat features of one image."""
    with torch.no_grad():
        return int(features(torch.zeros(1, *input_shape)).shape[1])


def _kaiming(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _xavier(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def _take_channels(model: nn.Module, channels: int) -> None:
    """Put a new first convolution for that many channels in the place of the old one."""
    name, old = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    parent, _, leaf = name.rpartition(".")
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    setattr(model.get_submodule(parent), leaf, new)


def _check_fits(model: nn.Module, name: str, input_shape: Shape) -> None:
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_shape))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"model.name={name} cannot take images of shape {tuple(input_shape)}: {error}. "
            "Choose a network for small images (model=resnet20, model=wrn_22_2, model.name=resnet18) or other data."
        ) from None
    finally:
        model.train()
