"""What gated parameters hold: their dense weights times median gates, or, within a batch, times a sample of the gates."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from sparse_callbacks.core.weights import SparseWeights
from sparse_callbacks.methods.l0 import gates
from sparse_callbacks.methods.l0.channel_members import Tied


class Gated:
    """Writes gates times dense weights into the parameters of a store, and knows which of them hold a sample.

    Args:
        weights: the weights, with their dense copies.
        tied: what goes with the output channels of each gated kernel, by name.
    """

    def __init__(self, weights: SparseWeights, tied: Mapping[str, Tied]) -> None:
        self._weights, self.tied = weights, dict(tied)
        self.medians: dict[str, Tensor] = {}
        """What each parameter is multiplied by between batches."""
        self.samples: dict[str, Tensor] = {}
        """Of the gates of each kernel, for its coming step."""
        self._astray: set[str] = set()
        """Parameters that do not hold their median gates now."""
        self._statistics = Statistics()

    def parameters(self, kernels: Iterable[str]) -> list[str]:
        """Names of ``kernels`` and of all that goes with them."""
        return [name for kernel in kernels for name in (kernel, *self.tied[kernel].members)]

    def factors(self, kernel: str, z: Tensor) -> dict[str, Tensor]:
        """What each parameter of a kernel's channels is multiplied by when its gates are ``z``."""
        return self.tied[kernel].factors(kernel, z, self._weights.params)

    def take_medians(self, kernel: str, log_alpha: Tensor) -> None:
        """Its masks and values shall be those of its median gates, and its sample is used up; :meth:`settle` writes them."""
        for name, factor in self.factors(kernel, gates.trained(log_alpha)).items():
            self.medians[name] = factor
            self._weights.set_factor(name, factor)
            self._astray.add(name)
        self.samples.pop(kernel, None)

    def sample(self, kernel: str, draw: Callable[[], Tensor], find: Callable[[str], nn.Module], finite: bool = True) -> None:
        """Its parameters hold a sample of its gates.

        Args:
            kernel: its name.
            draw: makes the sample, unless there is one.
            find: gives a batch norm by its path; from here on zeros of closed channels do not count there.
            finite: the dense weights are.
        """
        if kernel not in self.samples:
            self.samples[kernel] = draw()
        z, norms = self.samples[kernel], self.tied[kernel].norms
        for name, factor in self.factors(kernel, z).items():
            self._weights.set_passing_factor(name, factor)
            self._weights.write_masked([name], finite)
            self._astray.add(name)
        self._statistics.restore(norms)
        for path in norms:
            self._statistics.keep(path, find(path), z.flatten() != 0)

    def settle(self, names: Iterable[str], finite: bool = True) -> None:
        """Parameters hold their median gates."""
        for name in names:
            self._weights.set_passing_factor(name, self.medians[name])
            self._weights.write_masked([name], finite)
            self._astray.discard(name)

    def step_over(self, names: Iterable[str]) -> None:
        """An optimizer has stepped ``names``: their dense weights are back in the store, and nothing is written yet."""
        names = list(names)
        self._weights.swap_out(names)
        self._astray.update(names)

    def batch_over(self) -> None:
        """Median gates everywhere; what others wrote beside the sample is kept."""
        self._weights.absorb_if_written(self._astray)
        self.settle(list(self._astray))
        self._statistics.restore()

    def abort(self) -> None:
        """Median gates everywhere, wherever the batch was."""
        self.settle(self._weights.params)
        self._statistics.restore()


class Statistics:
    """Running statistics of batch norms, which shall take none of channels that a sample of the gates closes: they are zeros there."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Tensor, list[tuple[Tensor, Tensor]]]] = {}

    def keep(self, path: str, norm: nn.Module, is_open: Tensor) -> None:
        """Remember what a batch norm knows.

        Args:
            path: of the norm.
            norm: itself.
            is_open: bool [channels], those that may learn until :meth:`restore`.
        """
        buffers = [b for b in (norm.running_mean, norm.running_var) if isinstance(b, Tensor)]
        self._kept[path] = is_open, [(b, b.clone()) for b in buffers]

    def restore(self, paths: Iterable[str] | None = None) -> None:
        """Put back what was known of closed channels, in the norms at ``paths`` or in all."""
        for path in [p for p in (list(self._kept) if paths is None else paths) if p in self._kept]:
            is_open, buffers = self._kept.pop(path)
            for buffer, kept in buffers:
                buffer.copy_(torch.where(is_open, buffer, kept))
