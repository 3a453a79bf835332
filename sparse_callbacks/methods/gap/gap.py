"""GaP: scheduled grow-and-prune, one part of the network after another trains dense."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn

from sparse_callbacks.core.awaited import AWAITED, for_targets
from sparse_callbacks.core.calendar import Calendar, RunLength, Time
from sparse_callbacks.core.distributions import Distribution
from sparse_callbacks.core.found_masks import one_of
from sparse_callbacks.core.hooks import BatchEnd, Figures
from sparse_callbacks.core.initial_masks import InitialMask, StartsSparse
from sparse_callbacks.core.method import Options
from sparse_callbacks.core.ops import keep_largest
from sparse_callbacks.core.optimizer_life import RestartsOptimizers
from sparse_callbacks.core.plan import Plan
from sparse_callbacks.core.rescaling import Rescale
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.storages.storage import why_no_exchange
from sparse_callbacks.core.topology import Update
from sparse_callbacks.methods.gap.partitions import Partitions, check_partitions, number_of, split_layers
from sparse_callbacks.methods.gap.phases import check_phases, phase_steps

Init = Literal["random", "magnitude"]


class GaP(RestartsOptimizers, StartsSparse):
    """GaP, cyclic (C-GaP): one part of the network after another trains dense and is pruned (Ma et al., 2022).

    The layers form ``kappa`` partitions. In phase j = 0, 1, ... partition j mod kappa is dense and all others keep
    their masks. After the last step of the phase, layer by layer::

        prune  the dense partition to the largest |w|, all but floor(s * size)
        grow   every weight of the next partition, those that were pruned from zero

    After ``rounds * kappa`` phases all partitions are pruned, and fine-tuning goes on with these masks. So every weight
    is trained once a round, and the whole network is never dense: during a phase (N_d + (1 - s)(N - N_d)) / N of its
    weights are active. Optimizers and learning rate schedules start anew with each phase and with fine-tuning:
    ``configure_optimizers`` is called again at the next batch, and ``sparse_callbacks.horizon(self.trainer)`` gives it
    the optimizer steps of the phase. (Where several optimizers take different numbers of steps, each moves the masks of
    its parameters, and the fastest restarts all.) Phases that have begun keep their length in steps, also in a run that
    goes on longer. Steps that a GradScaler skips do not count, so they lengthen a phase: a schedule that refuses to go
    beyond its end (``OneCycleLR``) needs some steps to spare.

    Passes over the weights in a step: 1 in place (the mask on the weights) and 1 that reads
    (gradients, for inf and NaN).

    Differs from the paper and its code: exactly floor(s * size) weights of a layer are pruned, where the released
    percentile rule keeps too few among equal weights; gradients of pruned weights are masked, not only the weights
    after the step; masks are saved and not read from the zeros of a checkpoint; a layer of low sparsity is masked like
    any other. The released driver trains partition 0 once and then grows 1, 2, 0 a round, so it ends with one phase of
    partition 0 more than the paper's order 0, 1, 2 a round, which is the one here. The paper's phases last 30 epochs
    and its fine-tuning 150 (ResNet-50).

    Args:
        sparsity: fraction of zeros over the selected weights at the end, in [0, 1); None: 0.9, or what ``initial_mask``
            holds.
        partitions: their number (contiguous in the order of the model, the largest as small as possible), the layers at
            which new ones begin (``"2-5"``), ``"random(4)"`` (layers shuffled by ``seed``), or for each partition a
            glob or a list of globs on parameter names. One partition, with one round, is pruning at once after dense
            training.
        rounds: how often each partition becomes dense.
        epochs: length of a phase in epochs.
        every: length of a phase in optimizer steps (int) or as a fraction of the run (float). With neither, the phases
            share the time before ``finetune`` equally, rounded down to whole steps.
        finetune: when fine-tuning begins, in optimizer steps or as a fraction of the run; None: at 0.75 of the run, or
            with ``epochs`` or ``every`` after the last phase.
        distribution: how layers share the sparsity: a name such as ``"uniform"``, a mapping ``{glob: sparsity or name}``, a callable
            or an object; see :class:`~sparse_callbacks.core.method.Method`.
        init: masks of the sparse partitions at the start, ``"random"`` or ``"magnitude"``; another name of
            ``initial_mask``.
        initial_mask: where the first masks lie: ``"random"``, ``"magnitude"``, a score such as ``"snip"``, ``"nonzero"``, the path of a
            checkpoint, or a state dict; see :class:`~sparse_callbacks.core.initial_masks.StartsSparse`. The partition
            that is dense at first has every weight, whatever is given.
        rescale: ``"layer"`` or ``"fan_in"``: active weights of a new run are made larger once, to make up for the inputs that are
            gone; None: they stay as they are.
        restart: optimizers and schedules start anew with each phase; False keeps them (the state of grown weights is
            cleared).
        include: glob, or globs, on the names of parameters that become sparse; None: the weights of all supported layers except
            embeddings.
        exclude: glob, or globs, on the names of parameters that stay dense.
        seed: whole number from which everything random derives, together with the step and the parameter's name.
        **options: ``keep_dense``, ``print_plan`` and ``fresh_start``; see :class:`~sparse_callbacks.core.method.Options`.

    Raises:
        ValueError: arguments out of range, fewer layers than partitions, phases longer than the run, a schedule longer
            than a phase, or a model, optimizer or checkpoint that does not fit; before the first batch.

    Example:
        >>> from sparse_callbacks import GaP
        >>> GaP(sparsity=0.9, partitions=4, rounds=2, epochs=3).phases
        8

    Reference: Ma, Qin, Sun, Hou, Yuan, Xu, Wang, Chen, Jin, Xie: Effective model sparsification by scheduled
    grow-and-prune methods. ICLR 2022, arXiv 2106.09857.
    """

    first_update: ClassVar[int] = 0  # the first update comes after a whole phase
    explores: ClassVar[bool] = True
    arrives_at_stop: ClassVar[bool] = True

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        partitions: Partitions = 3,
        rounds: int = 1,
        epochs: float | None = None,
        every: Time | None = None,
        finetune: Time | None = None,
        distribution: Distribution = "uniform",
        init: Init | None = None,
        initial_mask: InitialMask = "random",
        rescale: Rescale | None = None,
        restart: bool = True,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        if init not in (None, "random", "magnitude"):
            raise ValueError(
                f"init={init!r} is not known. Give 'random' or 'magnitude' for the masks that training starts with."
            )
        super().__init__(
            sparsity,
            initial_mask=one_of(initial_mask, "init", init),
            rescale=rescale,
            distribution=distribution,
            include=include,
            exclude=exclude,
            seed=seed,
            **options,
        )
        self.partitions = check_partitions(partitions)
        check_phases(rounds, epochs, every, finetune, number_of(self.partitions))
        if not isinstance(restart, bool):
            raise ValueError(
                f"restart={restart!r} is neither True nor False: it says whether optimizers start anew with each phase."
            )
        self.rounds, self.epochs, self.finetune, self.restart = rounds, epochs, finetune, restart
        self.initial_mask, self.init = initial_mask, "random" if init is None else init
        self.every, self.start = every, 0  # the first phase begins with the run; without a start there is no calendar

    # ------------------------------------------------------------------ partitions

    @property
    def phases(self) -> int:
        """Phases before fine-tuning."""
        return self.rounds * number_of(self.partitions)

    def blocks(self, sizes: Mapping[str, int] | None = None) -> list[list[str]]:
        """Names of the parameters in each partition.

        Those that wait to be trained have their places too, as the partitions of the others would change with them.

        Args:
            sizes: number of weights by parameter name, in the order of the model; None: of the model of the run.
        """
        sizes = {e.name: e.size for e in for_targets(self.entries) if not e.reason} if sizes is None else sizes
        return split_layers(self.partitions, sizes, self.generator("partitions", 0))

    def pruned(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Masks that keep the largest weights, exactly the planned number in each layer.

        Args:
            names: names of the parameters.
        """

        def prune(layer: str, weight: Tensor) -> Tensor:
            return keep_largest(weight, weight.numel() - self.planned_zeros(layer, weight.numel()))

        return {n: self.weights.by_layer(n, prune, self.params[n].detach()) for n in names}

    def plan(self, model: nn.Module | None = None) -> Plan:
        made = super().plan(model)
        blocks = self.blocks({r.name: r.size for r in made if r.name in made.selected or r.reason in AWAITED})
        listed = [
            f"partition {i}: {', '.join(block)} ({sum(made[n].size for n in block):,} weights)"
            for i, block in enumerate(blocks)
        ]
        return replace(made, title="\n".join([made.title, *listed]))

    # ------------------------------------------------------------------ masks

    def attach(self, model: nn.Module) -> None:
        if self.saved is None or not self.saved.times:  # a run and its optimizers begin
            # in aux, so that a resumed run knows how long its optimizers still live
            self.aux["phase/run"] = self.aux["phase/optimizers"] = torch.tensor(self.step)

    def initial_masks(self) -> dict[str, Tensor]:
        dense = [n for n in self.blocks()[0] if n in self.params]
        # the dense partition last, as it is among the others too
        return {**super().initial_masks(), **self.weights.all_active(dense)}

    def after_step(self, step: Step) -> Update | None:
        return self.new_masks(step) if step.due else None

    def new_masks(self, step: Step) -> Update:
        blocks, phase = self.blocks(), self.phase_at(step.number)
        ended, begun = blocks[(phase - 1) % len(blocks)], blocks[phase % len(blocks)] if phase < self.phases else []
        # each optimizer moves the masks of its own parameters, when it has taken the steps of the phase
        mine = set(step.names)
        masks = self.pruned(n for n in ended if n in mine) | self.weights.all_active(n for n in begun if n in mine)
        return Update(masks, self.phase_figures(phase))

    def after_update(self, step: Step) -> None:
        if self.restart:
            # asked for, not done: the optimizer whose hook called this is still in its step
            self.host.request_restart()

    def phase_figures(self, phase: int) -> dict[str, float]:
        """Figures for the log when a phase begins.

        Args:
            phase: number of the phase, from 0.
        """
        turn, partition = divmod(phase, number_of(self.partitions))
        return self.own_figures(phase=phase, round=turn, dense_partition=partition if phase < self.phases else -1)

    # ------------------------------------------------------------------ phases

    def phase_at(self, number: int) -> int:
        """The phase of the run, from 0; ``phases`` while fine-tuning.

        Args:
            number: optimizer steps that were taken.
        """
        return min(number // self.times.every, self.phases)

    @property
    def dense_partition(self) -> int | None:
        """The partition that is dense now; None while fine-tuning."""
        phase = self.phase_at(self.step)
        return phase % number_of(self.partitions) if phase < self.phases else None

    def make_calendar(self, run: RunLength) -> Calendar:
        calendar = self._begun_calendar() or self._calendar(run)
        ends = int(self.aux["phase/run"]) + run.total()
        if calendar.stop > ends and not run.lenient:
            raise ValueError(
                f"the phases of this run were laid out up to step {calendar.stop}, and it ends at step {ends:g}. Train "
                "longer, or give fresh_start=True for new masks and phases."
            )
        # fine-tuning lasts to the end of the run, so the life of its optimizers depends on the length of this one
        self.aux["phase/length"] = torch.tensor(run.total(), dtype=torch.float64)
        at, configured = (min(s // calendar.every, self.phases) for s in (self.step, int(self.aux["phase/optimizers"])))
        if self.optimizers_are_old(at, configured):  # a run that was saved between a phase's end and the next batch
            self.host.request_restart()
        return calendar

    def optimizers_are_old(self, phase: int, configured: int) -> bool:
        """The optimizers were configured for another phase than the current one.

        Args:
            phase: the current phase.
            configured: the phase in which the optimizers were configured.
        """
        return self.restart and phase != configured

    def _begun_calendar(self) -> Calendar | None:
        """Phases that have begun stay as they are, also where the run's length has changed since."""
        times: Sequence[int] = () if self.saved is None else self.saved.times
        if not times and self.calendar is not None and self.step:
            times = self.calendar.times()
        return Calendar(times[0], times[1], times[2]) if times else None

    def begin_training(self, epoch: int) -> Figures:
        return self.phase_figures(self.phase_at(self.step)) if self.saved is None else {}

    def batch_end(self, end: BatchEnd) -> Figures:
        if end.run_over and not self.at_target and self.phase_at(self.step + end.skipped) == self.phases:
            # steps that a GradScaler skipped have delayed the end of the last phase behind that of the run
            self.weights.set_masks(self.pruned(self.params))
        return {}

    def _calendar(self, run: RunLength) -> Calendar:
        every = phase_steps(self.phases, self.epochs, self.every, self.finetune, run, self.step)
        return Calendar(every, 0, every * self.phases)

    @property
    def restarts(self) -> bool:
        """Whether optimizers start anew with each phase, as ``restart=`` says."""
        return self.restart

    @property
    def horizon(self) -> float | None:
        """Optimizer steps that the current optimizers live, those of their phase; None with ``restart=False``."""
        return self.life(self.times, self.aux) if self.restart else None

    def optimizer_life(self, run: RunLength) -> float | None:
        """:attr:`horizon`, also before the run has begun; see :func:`sparse_callbacks.horizon`.

        Args:
            run: the length of the run; not asked where a checkpoint that the run resumes from has the answer.
        """
        self.horizon_asked = True
        if self.attachment.in_training or not self.restart:
            return self.horizon
        if self.saved is not None and self.saved.times:
            times = self.saved.times
            return self.life(Calendar(times[0], times[1], times[2]), self.saved.aux)
        begun = torch.tensor(self.step)
        # a run that has not begun yet: what attach and make_calendar will write
        aux = {
            "phase/run": begun,
            "phase/optimizers": begun,
            "phase/length": torch.tensor(run.total(), dtype=torch.float64),
        }
        return self.life(self._begun_calendar() or self._calendar(run), aux)

    @property
    def shortest_life(self) -> float | None:
        """Optimizer steps of a phase or of fine-tuning, whichever is shorter.

        A schedule of fixed length must fit it.
        """
        if not self.restart:
            return None
        lives: list[float] = []
        finetuning = float(self.aux["phase/run"]) + float(self.aux["phase/length"]) - self.times.stop
        if finetuning > 0:
            lives.append(finetuning)
        if int(self.aux["phase/optimizers"]) < self.times.stop:  # a phase is still to come
            lives.append(self.times.every)
        return min(lives, default=None)

    def life(self, times: Calendar, aux: Mapping[str, Tensor]) -> float:
        """Optimizer steps that optimizers live.

        Args:
            times: the calendar of the run.
            aux: tensors of the method, which say when the optimizers were configured.
        """
        begun = int(aux["phase/optimizers"])
        if begun < times.stop:
            # from where they were configured, which may be within a phase: where a second fit began
            return (begun // times.every + 1) * times.every - begun
        return float(aux["phase/run"]) + float(aux["phase/length"]) - begun

    def begin_optimizer_life(self) -> None:
        """The host is about to configure new optimizers."""
        self.aux["phase/optimizers"] = torch.tensor(self.step)

    def shortfall(self) -> str:
        return (
            f"{type(self).__name__} ended after {self.step} steps, in phase {self.phase_at(self.step)} of "
            f"{self.phases} (from 0), with partition {self.dense_partition} still dense: sparsity "
            f"{self.measured_sparsity()['sparsity/total']:.4f} instead of {self.plan().total:.4f}. The last phase ends "
            f"at step {self.times.stop}: train longer, or give shorter phases."
        )


@why_no_exchange.register
def _(method: GaP) -> str:
    return "makes layers dense in turn, so sparse storage has nothing to save"
