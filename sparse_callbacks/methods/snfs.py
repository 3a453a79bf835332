"""SNFS: drop small weights, grow where the smoothed dense gradient is large."""

from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from sparse_callbacks.core.calendar import Time
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.distributions import Distribution
from sparse_callbacks.core.initial_masks import InitialMask
from sparse_callbacks.core.method import Options
from sparse_callbacks.core.record.multiply_adds import WeightsInStep
from sparse_callbacks.core.rescaling import Rescale
from sparse_callbacks.core.schedules import Schedule
from sparse_callbacks.core.state_claims import Kept, expected_aux
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.storages.storage import why_no_exchange
from sparse_callbacks.core.topology import Update
from sparse_callbacks.methods.drop_and_grow import DropAndGrow


class SNFS(DropAndGrow):
    """SNFS: grow where the smoothed dense gradient is large (Dettmers and Zettlemoyer, 2019).

    Every step smooths the dense gradient; every ``every`` steps an update follows the gradient step, layer by layer::

        m    = smoothing * m + (1 - smoothing) * dL/dw
        keep  the active weights with the largest |w|, all but k = int(drop_fraction(t) * active)
        grow  the k positions with the largest |m| among all others, those just dropped included

    Costs two dense copies of the sparse weights, one of them memory for the next mean.

    Passes over the weights in a step: 3 in place (the mask, and two for the smoothed
    gradient) and 1 that reads (gradients, for inf and NaN).

    Differs from the paper: a layer keeps its planned count, without the redistribution between layers by mean momentum;
    the smoothed gradient is kept here for every optimizer, where the paper uses the momentum buffer of SGD; the
    fraction falls by a cosine, as in RigL's comparison.

    Args:
        sparsity: fraction of zeros over the selected weights, in [0, 1); None: 0.9, or what ``initial_mask`` holds.
        distribution: how layers share the sparsity: a name such as ``"uniform"``, a mapping ``{glob: sparsity or name}``, a callable
            or an object; see :class:`~sparse_callbacks.core.method.Method`.
        every: optimizer steps (int) or fraction of the run (float) between updates; None: the published 100, shortened, with a
            message, in runs that would see fewer than ten updates.
        start: first time of an update, in optimizer steps (int) or as a fraction of the run (float).
        stop: last time of an update, in the same units.
        drop_fraction: fraction of a layer's active weights that an update replaces, in [0, 1]; a number falls by a cosine to 0 at
            ``stop``; a schedule or its text (``"constant(0.3)"``) is taken as it is.
        smoothing: weight of the past in the smoothed gradient, in [0, 1).
        initial_mask: where the first masks lie: ``"random"``, ``"magnitude"``, a score such as ``"snip"``, ``"nonzero"``, the path of a
            checkpoint, or a state dict; see :class:`~sparse_callbacks.core.initial_masks.StartsSparse`.
        rescale: ``"layer"`` or ``"fan_in"``: active weights of a new run are made larger once, to make up for the inputs that are
            gone; None: they stay as they are.
        pattern: where active weights may lie: ``"2:4"``, ``"transposable 2:4"``, ``"fan_in"`` or ``"fan_in/64"``; None: anywhere. See
            :class:`~sparse_callbacks.core.initial_masks.StartsSparse`. Weights, columns and groups move as in
            :class:`~sparse_callbacks.RigL`, by |m| in the place of |dL/dw|.
        ablation: with ``pattern="fan_in"``, the share of the planned fan-in, in (0, 1], that an output unit must have in salient
            weights, or it loses all of its weights; None: all units stay. Salient are the weights that stay, and the k largest |m|.
        include: glob, or globs, on the names of parameters that become sparse; None: the weights of all supported layers except
            embeddings.
        exclude: glob, or globs, on the names of parameters that stay dense.
        seed: whole number from which everything random derives, together with the step and the parameter's name.
        **options: ``keep_dense``, ``print_plan`` and ``fresh_start``; see :class:`~sparse_callbacks.core.method.Options`.

    Raises:
        ValueError: arguments out of range, or a model, optimizer or checkpoint that does not fit; before the first
            batch.

    Example:
        >>> from sparse_callbacks import SNFS
        >>> SNFS(sparsity=0.8, smoothing=0.95).smoothing
        0.95

    Reference: Dettmers, Zettlemoyer: Sparse Networks from Scratch: Faster Training without Losing Performance.
    arXiv 1907.04840, 2019, section 3.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        distribution: Distribution = "erdos_renyi_kernel",
        every: Time | None = None,
        start: Time = 0,
        stop: Time = 0.75,
        drop_fraction: float | str | Schedule = 0.3,
        smoothing: float = 0.9,
        initial_mask: InitialMask = "random",
        rescale: Rescale | None = None,
        pattern: str | None = None,
        ablation: float | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            sparsity,
            distribution=distribution,
            every=every,
            start=start,
            stop=stop,
            drop_fraction=drop_fraction,
            initial_mask=initial_mask,
            rescale=rescale,
            pattern=pattern,
            ablation=ablation,
            include=include,
            exclude=exclude,
            seed=seed,
            **options,
        )
        if isinstance(smoothing, bool) or not isinstance(smoothing, int | float) or not 0.0 <= smoothing < 1.0:
            raise ValueError(
                f"smoothing={smoothing!r} is not in [0, 1): it is the weight of the past. The published value is 0.9."
            )
        self.smoothing = smoothing
        self._smoothed: dict[str, Tensor] = {}
        self._spare: dict[str, Tensor] = {}  # the memory of means that are no longer needed, for the next ones

    def wants_dense_gradients(self, step: Step) -> bool:
        return True  # every step is smoothed, not only those before an update

    def weights_in_step(self, step: Step) -> WeightsInStep:
        return WeightsInStep(self.weights.active_counts, {n: self.weights.size(n) for n in step.names})

    def before_step(self, step: Step) -> None:
        # not in aux yet: a GradScaler may still skip the step, and its gradients would stay in the mean for good
        for name in step.names:
            left = self._smoothed.pop(name, None)  # of a step that was skipped
            if (gradient := step.gradient(name)) is not None:
                past = self.aux.get(f"smoothed/{name}")
                # not in the gradient itself: it belongs to the optimizer, which has not stepped yet
                spare = self._spare.pop(name, left)
                fits = spare is not None and _is_like(spare, gradient)
                share = torch.mul(gradient, 1 - self.smoothing, out=spare if fits else None)
                self._smoothed[name] = share if past is None else share.add_(past, alpha=self.smoothing)
        # last, as it masks the gradients that were read above
        super().before_step(step)

    def after_step(self, step: Step) -> Update | None:
        # those of this optimizer: the step of another may have been announced before this one was taken
        smoothed = {name: self._smoothed.pop(name) for name in step.names if name in self._smoothed}
        # without a GradScaler a step with an inf is taken, and would leave an inf in the mean
        finite = step.finite
        for name, mean in smoothed.items():
            past = self.aux.get(f"smoothed/{name}")
            if finite:
                self.aux[f"smoothed/{name}"] = mean  # because a resumed run must grow where this one would have
            if (unused := past if finite else mean) is not None:
                self._spare[name] = unused
        # after the mean has moved: an update grows by the momentum with the current gradient in it
        return super().after_step(step)

    def grow_scores(self, step: Step, name: str) -> Tensor | None:
        return self.aux.get(f"smoothed/{name}")


def _is_like(memory: Tensor, tensor: Tensor) -> bool:
    """Whether ``memory`` is such as the product of ``tensor`` and a number would get."""
    return (memory.dtype, memory.device, memory.shape, memory.stride()) == (
        tensor.dtype,
        tensor.device,
        tensor.shape,
        tensor.stride(),
    )


@expected_aux.register
def _(method: SNFS, saved: SavedRun, model: nn.Module) -> Mapping[str, Kept]:
    return {f"smoothed/{name}": Kept(tuple(mask.shape)) for name, mask in saved.masks.items()}


@why_no_exchange.register
def _(method: SNFS) -> str:
    return "keeps a momentum of the gradient of every weight, pruned ones too, so sparse storage has nothing to save"
