"""Gated parameters: dense weights times median gates, or, within a batch, times a sample of the gates."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparse_callbacks.core.dense_copy import undone
from sparse_callbacks.core.weights import SparseWeights
from sparse_callbacks.methods.l0 import gates
from sparse_callbacks.methods.l0.channel_members import ChannelMembers


class GatedWeights:
    """Writes gates times dense weights into the parameters of a store, and keeps track of what each parameter holds.

    What a gated parameter holds, and what changes it::

        median * dense   -- a batch starts: write_sample ------------------------->  sample * dense
        sample * dense   -- before an optimizer step: the store swaps buffers ---->  dense
        dense            -- after_step swaps back -------------------------------->  sample * dense before the step
                         -- write_medians (manual optimization: write_sample) ---->  median (next sample) * dense
        sample * dense   -- the batch ends: after_batch -------------------------->  median * dense

    Args:
        store: keeps the dense weights.
        members: what belongs to the output channels of each gated kernel, by the kernel's name.
    """

    def __init__(self, store: SparseWeights, members: Mapping[str, ChannelMembers]) -> None:
        self._weights, self.members = store, dict(members)
        self.medians: dict[str, Tensor] = {}
        """The factor of each parameter between batches."""
        self.samples: dict[str, Tensor] = {}
        """Samples of the gates of each kernel for its next step; missing where the last one is used up."""
        self._not_at_median: set[str] = set()
        """Parameters that do not hold their median gates now."""
        self.kept = store.scratch
        self._statistics = NormStatistics()

    def parameters(self, kernels: Iterable[str]) -> list[str]:
        """Names of ``kernels`` and of all parameters that belong to their channels."""
        return [name for kernel in kernels for name in (kernel, *self.members[kernel].names)]

    def sizes(self, kernels: Iterable[str]) -> dict[str, int]:
        """Number of parameters of each of ``kernels``, with its biases."""
        # gains and shifts of norms are closed too, and not counted: density is about kernels and their biases
        return {k: sum(self._weights.params[n].numel() for n in (k, *self.members[k].biases)) for k in kernels}

    def factors(self, kernel: str, z: Tensor) -> dict[str, Tensor]:
        """The factor of each parameter of a kernel's channels when the gates of the kernel are ``z``."""
        return self.members[kernel].factors(kernel, z, self._weights.params)

    def take_medians(self, kernel: str, log_alpha: Tensor) -> None:
        """Take the median gates of a kernel from its new ``log_alpha``, and drop its sample.

        :meth:`write_medians` writes them into the parameters.
        """
        # in the memory of the last ones: the store multiplies by them until it is given these
        medians = gates.trained(log_alpha, self.kept.like(f"medians/{kernel}", log_alpha))
        for name, factor in self.factors(kernel, medians).items():
            self.medians[name] = factor
            self._weights.set_factor(name, factor)
            self._not_at_median.add(name)
        # the next batch draws anew: this sample belonged to the gates before
        self.samples.pop(kernel, None)

    def begin(
        self, kernel: str, log_alpha: Tensor, droprate: float | None = None, held: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take the median gates of a kernel when training starts, and the dense weights that belong to them.

        Args:
            kernel: name of the kernel.
            log_alpha: gates of the kernel.
            droprate: the droprate that the gates were made with if they are new; None for gates of an earlier run.
            held: the dense values that earlier gates had, by parameter.
        """
        self.take_medians(kernel, log_alpha)
        for name in self.parameters([kernel]):
            dense = self._weights.dense_values(name)
            if droprate is not None and name not in self.members[kernel].affine:
                # the mean of new gates is about 1 - droprate: the layer's output keeps its size
                dense.div_(1 - droprate)
            elif droprate is None and held is not None and name in held:
                # the parameters hold median * dense here, and may have been written to since the last run
                holds = self._weights.params[name].detach()
                dense.copy_(undone(holds, self.medians[name], held[name].to(dense)))

    def write_sample(
        self, kernel: str, draw: Callable[[], Tensor], find: Callable[[str], nn.Module], finite: bool = True
    ) -> None:
        """Write a sample of a kernel's gates into the parameters of its channels.

        Args:
            kernel: name of the kernel.
            draw: makes the sample, unless the kernel has one already: all micro-batches of a window share a sample.
            find: gives a batch norm by its path; from now on the norm learns no statistics from closed channels.
            finite: whether the dense weights are finite.
        """
        if kernel not in self.samples:
            self.samples[kernel] = draw()
        z, norms = self.samples[kernel], self.members[kernel].norms
        for name, factor in self.factors(kernel, z).items():
            self._weights.set_passing_factor(name, factor)
            self._weights.write_masked([name], finite)
            self._not_at_median.add(name)
        # in manual optimization a batch has several samples: what the last one closed is put back before the next one
        self._statistics.restore(norms)
        for path in norms:
            self._statistics.keep(path, find(path), z.flatten() != 0)

    def write_medians(self, names: Iterable[str], finite: bool = True) -> None:
        """Write the median gates into the parameters ``names``."""
        for name in names:
            self._weights.set_passing_factor(name, self.medians[name])
            self._weights.write_masked([name], finite)
            self._not_at_median.discard(name)

    def pull_back(self, kernel: str, log_alpha: Tensor, l2: float, finite: bool) -> Tensor:
        """Turn gradients by gate * dense into those by dense, in place, and return the gradient by ``log_alpha``.

        Args:
            kernel: name of the kernel.
            log_alpha: gates of the kernel.
            l2: coefficient of the expected squared norm over 2, whose gradient is added.
            finite: whether the gradients are known to be finite.
        """
        # a step outside of a batch finds no sample: the parameters hold the median gates then
        z, affine = self.samples.get(kernel, self.medians[kernel]), self.members[kernel].affine
        pulls = []
        for name, factor in self.factors(kernel, z).items():
            gradient, dense = self._weights.params[name].grad, self._weights.dense_values(name)
            if gradient is None:
                continue
            if not finite:  # behind a closed gate it may be anything, and a product with 0 would leave NaN
                gradient.masked_fill_(factor == 0, 0)
            if name not in affine:
                # before the gradient is multiplied: this is the derivative by the product of gate and weight
                pulls.append(self._pull(kernel, name, gradient, dense, z))
            gradient.mul_(factor)
            if l2 and name not in affine:
                # E[(z w)^2] counts w^2 with P(z != 0), as the method's expected L2 norm is defined
                gradient.addcmul_(dense, self.factors(kernel, gates.p_open(log_alpha))[name], value=l2)
        if not pulls:
            return torch.zeros_like(z)
        return pulls[0] if len(pulls) == 1 else torch.stack(pulls).sum(0)

    def _pull(self, kernel: str, name: str, gradient: Tensor, dense: Tensor, z: Tensor) -> Tensor:
        """The gradient by the log_alpha of a kernel that comes from one of its parameters."""
        if gradient.shape != z.shape:  # the product is summed up at once
            return gates.log_alpha_gradient(gradient, dense, z, self.kept.like("product", gradient, z.dtype))
        # gates of single weights: of every kernel it waits for the optimizer's step
        product = self.kept.like(f"pull/{kernel}/{name}", gradient, z.dtype)
        return gates.log_alpha_gradient(
            gradient, dense, z, product, (self.kept.like("p_open", z), self.kept.like("gradient", z))
        )

    def after_step(self, names: Iterable[str]) -> None:
        """An optimizer has stepped ``names``: put their dense weights back into the store, and write nothing yet."""
        names = list(names)
        self._weights.swap_out(names)
        self._not_at_median.update(names)

    def after_batch(self) -> None:
        """Write median gates wherever a parameter holds something else; what others wrote over the sample is kept."""
        # first the store takes in what was written, which it divides by the factor in force: that of the sample
        self._weights.absorb_if_written(self._not_at_median)
        self.write_medians(list(self._not_at_median))
        self._statistics.restore()

    def write_all_medians(self) -> None:
        """Write median gates into every parameter, at whatever point of a batch this is."""
        self.write_medians(self._weights.params)
        self._statistics.restore()

    @contextmanager
    def between_batches(self) -> Iterator[None]:
        """Inside, parameters hold their median gates and norms the statistics that they keep, also within a batch."""
        with self._weights.effective(), self._statistics.settled():
            yield


class NormStatistics:
    """Running statistics of batch norms, which must not change for closed channels: these hold only zeros."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Tensor, list[tuple[Tensor, Tensor]]]] = {}

    def keep(self, path: str, norm: nn.Module, is_open: Tensor) -> None:
        """Copy the statistics of a batch norm before it runs.

        Args:
            path: path of the norm.
            norm: the norm.
            is_open: bool [channels], channels whose statistics may change until :meth:`restore`.
        """
        # both are None in a norm with track_running_stats=False; the count of batches may go on for all channels
        buffers = [b for b in (norm.running_mean, norm.running_var) if isinstance(b, Tensor)]
        self._kept[path] = is_open, [(b, b.clone()) for b in buffers]

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Inside, all norms hold what :meth:`restore` would leave them."""
        found = [(is_open, *pair) for is_open, buffers in self._kept.values() for pair in buffers]
        held = [buffer.clone() for _, buffer, _ in found]
        for is_open, buffer, kept in found:
            buffer.copy_(torch.where(is_open, buffer, kept))
        try:
            yield
        finally:
            for (_, buffer, _), values in zip(found, held, strict=True):
                buffer.copy_(values)

    def restore(self, paths: Iterable[str] | None = None) -> None:
        """Put back the statistics of closed channels, in the norms at ``paths``, or in all norms for None."""
        for path in list(self._kept) if paths is None else paths:
            if path not in self._kept:
                continue
            is_open, buffers = self._kept.pop(path)
            for buffer, kept in buffers:
                # in place: the norm, and whoever averages or sends its buffers, keeps the same tensor
                buffer.copy_(torch.where(is_open, buffer, kept))
