"""Constrained L0 for short runs, and what its tests read of gates and constraints beyond the public surface."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sparse_callbacks import ConstrainedL0
from sparse_callbacks.methods.l0.constraint import shares_of
from sparse_callbacks.testing.networks import Classifier


def l0(density: Any = 0.5, **options: Any) -> ConstrainedL0:
    """Gates that move within a short run."""
    quick = {"gate_lr": 0.1, "dual_lr": 0.1, "print_plan": False}
    return ConstrainedL0(density, **(quick | options))


def at_start(act: Any) -> pl.Callback:
    """Calls ``act()`` when training starts, after the sparsity callbacks' own start."""
    return pl.callbacks.LambdaCallback(on_train_start=lambda *_: act())


def close_some(callback: ConstrainedL0, log_alpha: float = -4.0, every: int = 3) -> None:
    """Every third gate of each layer is almost always closed, the others have fractions."""
    for key, value in callback.aux.items():
        if key.startswith("log_alpha/"):
            value.copy_(torch.linspace(-1.0, 3.0, value.numel()).view_as(value))
            value.view(-1)[::every] = log_alpha
    for kernel in tied_kernels(callback):
        take_medians(callback, kernel)


def tied_kernels(callback: Any) -> Mapping[str, Any]:
    """By kernel with gates, the parameters that go with its channels."""
    return callback.gated.members


def constraints_of(callback: Any) -> list[Any]:
    """The constraints, one for each multiplier."""
    return list(callback._constraints)


def median_gates(callback: Any, name: str) -> Tensor:
    """Median gates of a parameter, as the weights hold them between batches."""
    return callback.gated.medians[name]


def sampled_gates(callback: Any, kernel: str) -> Tensor:
    """Gates that were drawn for the current batch."""
    return callback.gated.samples[kernel]


def sampled_factor(callback: Any, kernel: str, name: str) -> Tensor:
    """What the current sample of a kernel's gates multiplies a parameter of its channels by."""
    return callback.gated.factors(kernel, sampled_gates(callback, kernel))[name]


def take_medians(callback: Any, kernel: str) -> None:
    """Make a kernel's median gates those of its current parameters."""
    callback.gated.take_medians(kernel, callback.aux[f"log_alpha/{kernel}"])


def noise_of(callback: Any, kernel: str) -> Tensor:
    """Noise of the gates in the current batch."""
    return callback.noise(kernel)


def pulls_on_gates(callback: Any) -> Mapping[str, Tensor]:
    """Gradients of the loss by the gates, between the look at the gradients and the step of the gates."""
    return callback._pulls


def expected_densities(callback: Any) -> list[tuple[Any, float]]:
    """Each constraint with the expected share of parameters of its layers."""
    return callback._densities()


def shares_of_parameters(callback: Any, kernels: Iterable[str]) -> dict[str, float]:
    """Share of each kernel, with its biases, in the parameters of all ``kernels``."""
    return shares_of(callback.gated.sizes(kernels))


class Flat(Classifier):
    """A loss that no weight changes."""

    def loss(self, batch: Any) -> Tensor:
        return 0 * super().loss(batch)


class Convolutions(nn.Sequential):
    """Two convolutions with norms and a classifier, in float64."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(2, 12, 3),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 9, 2, padding=1),
            nn.BatchNorm2d(9),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(144, 4),
        )
        self.double()
        for norm in (self[1], self[4]):
            nn.init.normal_(norm.bias, 0.5)


def purged(net: Convolutions) -> nn.Module:
    """The same network without channels and inputs that are zero, made smaller by hand."""
    first, second = (net[i].weight.detach().flatten(1).abs().sum(1) > 0 for i in (0, 3))
    small = nn.Sequential(
        nn.Conv2d(2, int(first.sum()), 3),
        nn.BatchNorm2d(int(first.sum())),
        nn.ReLU(),
        nn.Conv2d(int(first.sum()), int(second.sum()), 2, padding=1),
        nn.BatchNorm2d(int(second.sum())),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * int(second.sum()), 4),
    ).double()
    state = net.state_dict()
    kept = {"0": first, "1": first, "3": second, "4": second}
    for key, value in state.items():
        value = value[kept[key[0]]] if key[0] in kept and value.ndim else value
        value = value[:, first] if key == "3.weight" else value
        state[key] = value[:, second.repeat_interleave(16)] if key == "7.weight" else value
    small.load_state_dict(state)
    return small.eval()
