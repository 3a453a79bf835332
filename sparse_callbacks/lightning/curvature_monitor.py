"""The callback that logs how sharp the loss is in each layer, beside the curves of sparsity."""

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from sparse_callbacks.core import distributed
from sparse_callbacks.core.argument_types import checked
from sparse_callbacks.core.arguments import refuse_outside
from sparse_callbacks.core.clock import wait_for
from sparse_callbacks.core.curvature import kfac_spectral_radius
from sparse_callbacks.core.record.samples import samples_in
from sparse_callbacks.core.selection import patterns
from sparse_callbacks.core.watched_layers import WatchedLayers, watchable_layers
from sparse_callbacks.lightning import curves
from sparse_callbacks.lightning.callback import peers_of
from sparse_callbacks.lightning.namespaces import Trainer
from sparse_callbacks.lightning.refusals import SHARDED, has_class_named
from sparse_callbacks.lightning.sharded import shards_model
from sparse_callbacks.lightning.trainer_optimizers import scaler_of
from sparse_callbacks.lightning.turns import TurnTaking

if TYPE_CHECKING:
    from pytorch_lightning import Callback as AnyCallback
else:
    from sparse_callbacks.lightning.callback import AnyCallback


class CurvatureMonitor(AnyCallback):
    """Logs the K-FAC spectral radius of each linear layer and convolution, to every logger of the Trainer.

    The radius of a layer is ``lambda_max(A) * lambda_max(G)``, the largest eigenvalue of its block of the Fisher matrix as
    K-FAC approximates it: how sharp the loss is in that layer, in units of loss by squared weight. In every n-th optimizer
    step forward and backward pass of one micro-batch, the first of the step, show the factors: ``A`` is the mean over samples
    and positions of ``a a^T`` of the inputs, with a last element 1 where the bias is trained, and ``G`` the mean over samples
    of the sum over positions of ``g g^T`` of the gradients of each sample's loss by the outputs. The loss is that of
    training, with the labels of the batch (the "empirical" form). See
    :func:`~sparse_callbacks.core.curvature.kfac_spectral_radius` for the formulas.

    Each measurement gives a row of curves, under the number of its step like rows of sparsity:

    - ``curvature/<weight>``: the radius of a layer, by the name of its weight in ``named_parameters()``;
    - ``curvature/max``: the largest of them, the radius of all blocks together;
    - ``curvature/milliseconds``: what the power iterations of the measurement took;
    - ``curvature/share_of_step``: the same, as a share of the time of the rest of the step.

    What is shown of a sparse network: inputs and gradients are those of the network under its masks, and the block is that of
    all weights of the layer, the pruned ones too. The block of the active weights alone is a part of it, whose radius is at
    most this one.

    Between measurements nothing is planted, timed or kept. A measurement holds the inputs and output gradients of the layers
    until the backward pass ends, in addition to what autograd holds. The network trains as without the callback, bit for bit.

    - Gradients under a GradScaler are unscaled; a step that it skips shows no radius that is inf or NaN.
    - A compiled model runs eagerly in the measured micro-batch, and is not compiled again.
    - With several processes each measures its own batch, and the mean of the radii is logged.
    - In manual optimization, and of an optimizer of two passes, the first backward pass of a batch is measured; losses that
      are divided there for accumulation are taken as they are.
    - Layers without a figure: frozen ones, weights computed from others, and what attention modules and recurrent layers of
      torch multiply by, which call no layer.

    Args:
        every: optimizer steps between measurements, from the first step on.
        include: globs over names of weights to measure; None: all linear layers and convolutions.
        exclude: globs over names of weights to leave out.
        iterations: products with each factor at most. More come closer to the radius, from below.
        tolerance: relative change in one iteration at which power iteration ends.
        reduction: whether the loss is the "mean" over the samples of a batch or their "sum". Samples are counted by the first
            dimension of the first tensor in the batch.

    Attributes:
        radii: the latest radii by name of the weight; empty before the first measurement.

    Raises:
        ValueError: an argument out of range; a glob that matches no layer, a strategy that keeps parameters in pieces, or
            ParallelGaP beside it, before the first batch.

    Example:
        >>> from sparse_callbacks import CurvatureMonitor, RigL
        >>> callbacks = [RigL(0.9), CurvatureMonitor(every=200, exclude="head.*")]
        >>> # pl.Trainer(callbacks=callbacks).fit(module, data)

    References:
        Martens and Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature"; Grosse and Martens
        2016, "A Kronecker-factored approximate Fisher matrix for convolution layers".
    """

    @checked
    def __init__(
        self,
        every: int = 100,
        *,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        iterations: int = 20,
        tolerance: float = 1e-3,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        refuse_outside(every, "every", 1, math.inf)
        refuse_outside(iterations, "iterations", 1, math.inf)
        refuse_outside(tolerance, "tolerance", 0, 1)
        self.every, self.iterations, self.tolerance, self.reduction = every, iterations, tolerance, reduction
        self.include, self.exclude = patterns(include, "include"), patterns(exclude, "exclude")
        self.radii: dict[str, float] = {}
        self._told = False  # which layers have no figure
        self._forget_fit()

    def _forget_fit(self) -> None:
        self._layers: dict[str, list[nn.Module]] = {}
        self._watched: WatchedLayers | None = None
        self._step = -1  # the number of the step that was measured last
        self._samples: int | None = None
        self._begun = 0.0  # when the measured step began, in seconds
        self._found: Tensor | None = None  # radii of this process, and the milliseconds that they took
        self._unseen: list[str] = []  # layers that no gradient has come to

    # ------------------------------------------------------------------ Lightning's hooks, in their order

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if shards_model(trainer) or has_class_named(trainer.strategy, SHARDED):
            raise ValueError(
                f"CurvatureMonitor under {type(trainer.strategy).__name__}: layers may see parts of their inputs and outputs, "
                "and the factors are those of whole ones. Use strategy='ddp', one device, or leave the callback out."
            )
        for peer in peers_of(trainer):
            if isinstance(peer, TurnTaking):
                raise ValueError(
                    f"CurvatureMonitor beside {type(peer).__name__}: several networks train there, and one curve would be of "
                    "all of them. Leave the callback out, or use GaP."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget_fit()
        self._layers = watchable_layers(pl_module, self.include, self.exclude)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (
            self._watched is not None
        ):  # the module or another callback has left the rest of the epoch out, and no hook came
            self._stop_watching()
            self._step = -1
        step = curves.step_number(trainer)
        if step % self.every or step == self._step:
            return
        self._step, self._found = step, None
        self._samples = samples_in(batch)
        wait_for([pl_module.device])
        self._begun = time.perf_counter()
        self._watched = WatchedLayers(self._layers)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._measure(trainer, pl_module)  # in manual optimization a backward pass may come without a hook
        if self._found is not None and not curves.accumulates(trainer):
            self._log(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_watching()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_watching()
        self._forget_fit()

    # ------------------------------------------------------------------ parts of the hooks

    def _stop_watching(self) -> None:
        watched, self._watched = self._watched, None
        if watched is not None:
            watched.end()

    def _measure(self, trainer: Trainer, module: LightningModule) -> None:
        """The backward pass is over: find the radii, and let go of inputs and gradients."""
        watched, self._watched = self._watched, None
        if watched is None:
            return
        calls = watched.end()
        self._unseen = [name for name, found in calls.items() if not found]
        wait_for([module.device])
        begun = time.perf_counter()
        samples = self._samples or next((len(found[0].inputs) for found in calls.values() if found), 1)
        scaler = scaler_of(trainer)
        scale = 1.0 if scaler is None else 1 / scaler.get_scale()
        if module.automatic_optimization:
            scale *= trainer.accumulate_grad_batches  # by which Lightning divides the loss
        if self.reduction == "mean":
            scale *= samples
        radii = [
            # popped: the memory of one layer is free before the next one needs some
            kfac_spectral_radius(calls.pop(name), samples, scale, self.iterations, self.tolerance)
            for name in list(calls)
        ]
        wait_for([module.device])
        spent = 1e3 * (time.perf_counter() - begun)
        self._found = torch.tensor([*radii, spent], dtype=torch.float64)

    def _log(self, trainer: Trainer, module: LightningModule) -> None:
        """The measured step is over: a row of curves."""
        assert self._found is not None
        wait_for([module.device])
        whole = 1e3 * (time.perf_counter() - self._begun)
        found, self._found = self._found, None
        *radii, spent, rest = _means_over_ranks([*found.tolist(), whole - float(found[-1])], module.device)
        self.radii = {name: r for name, r in zip(self._layers, radii, strict=True) if math.isfinite(r)}
        self._tell_unseen()
        if not self.radii:
            return
        figures = {f"curvature/{name}": radius for name, radius in self.radii.items()}
        figures["curvature/max"] = max(self.radii.values())
        figures |= {"curvature/milliseconds": spent, "curvature/share_of_step": spent / rest}
        curves.log_row(trainer, figures, self._step, trainer.current_epoch)

    def _tell_unseen(self) -> None:
        """Say once which layers have no figure, where that is not what was asked for."""
        if self._told or not self._unseen or (self.include is None and len(self._unseen) < len(self._layers)):
            return
        self._told = True
        rank_zero_warn(
            f"CurvatureMonitor has no figure for {', '.join(self._unseen)}: frozen, not called as a layer in the measured "
            "batch, or without a gradient there."
        )

    def __getstate__(self) -> dict[str, Any]:
        # for a process that is started, or a copy: neither belongs to a fit
        return {**vars(self), "_layers": {}, "_watched": None, "_found": None, "_step": -1}


def _means_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """The mean of each value over the ranks where it is finite; NaN where it is on none."""
    mine = torch.tensor(values, dtype=torch.float64)
    finite = mine.isfinite()
    both = torch.stack([mine.where(finite, 0.0), finite.double()])
    if distributed.world_size() > 1:
        both = both.to(device)  # NCCL sends what lies on a GPU alone
        distributed.total([both])
    return (both[0] / both[1]).tolist()
