"""Published networks have their published sizes, and every network takes the images of every set."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from sparse_callbacks.tasks import models

MNIST, CIFAR, DIGITS = (1, 28, 28), (3, 32, 32), (1, 8, 8)
NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "conf/model").glob("*.yaml"))


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "shape", "parameters"),
    [
        (models.lenet_300_100, MNIST, 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10),
        (models.lenet5, MNIST, 61_706),
        (models.lenet5_caffe, MNIST, 431_080),
        (models.resnet20, CIFAR, 269_722),
        # stem; groups of one entering and five inner 3 x 3 convolutions and a 1 x 1 one; norms; linear layer
        (models.wrn_22_2, CIFAR, 432 + 51_200 + 204_800 + 819_200 + 2 * (176 + 352 + 704 + 128) + 1_290),
    ],
)
def test_sizes(make: Callable[..., nn.Module], shape: tuple[int, ...], parameters: int) -> None:
    assert size(make(shape, 10)) == parameters


@pytest.mark.parametrize("shape", [DIGITS, MNIST, CIFAR])
@pytest.mark.parametrize("name", NAMES)
def test_every_network_takes_every_shape_and_number_of_classes(name: str, shape: tuple[int, ...]) -> None:
    cfg = OmegaConf.load(Path(__file__).parents[2] / f"conf/model/{name}.yaml")
    model = instantiate(cfg, input_shape=shape, num_classes=7)
    images = torch.randn(3, *shape)
    logits = model(images)
    assert logits.shape == (3, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_yaml_spells_out_every_argument_with_its_default(name: str) -> None:
    cfg = OmegaConf.load(Path(__file__).parents[2] / f"conf/model/{name}.yaml")
    make = getattr(models, cfg.pop("_target_").rpartition(".")[2])
    signature = {k: p.default for k, p in inspect.signature(make).parameters.items() if p.default is not p.empty}
    signature.pop("read", None)  # the run says it, not its configuration
    assert {k: tuple(v) if OmegaConf.is_list(v) else v for k, v in cfg.items()} == signature


def test_mlp_widths() -> None:
    sizes = [m.weight.shape for m in models.mlp(DIGITS, 10, hidden=(5, 6)) if isinstance(m, nn.Linear)]
    assert sizes == [(5, 64), (6, 5), (10, 6)]


def test_residual_shortcut_subsamples_and_pads_with_zero_channels() -> None:
    block = models.ResidualBlock(2, 4, stride=2).eval()
    for conv in (block.conv1, block.conv2):
        nn.init.zeros_(conv.weight)
    x = torch.rand(1, 2, 4, 4)
    out = block(x)
    assert torch.equal(out[:, 1:3], x[..., ::2, ::2])
    assert not out[:, [0, 3]].any()


def test_pre_activation_shortcut_takes_the_activated_input() -> None:
    block = models.PreActivationBlock(2, 4, stride=1, dropout=0.0).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 2, 4, 4)
    assert block.shortcut is not None
    assert torch.equal(block(x), block.shortcut(torch.relu(block.norm1(x))))
    same_width = models.PreActivationBlock(2, 2, stride=1, dropout=0.0).eval()
    nn.init.zeros_(same_width.conv2.weight)
    assert torch.equal(same_width(x), x)


def test_enlarge_leaves_large_images_alone() -> None:
    large = torch.randn(2, 1, 30, 28)
    assert models.Enlarge(28)(large) is large
    assert models.Enlarge(28)(torch.ones(2, 1, 8, 30)).shape == (2, 1, 28, 30)
