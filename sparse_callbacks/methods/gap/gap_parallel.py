"""P-GaP: parallel grow-and-prune, with a worker for each part of the network."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from sparse_callbacks.core import distributed
from sparse_callbacks.core.calendar import Calendar, RunLength
from sparse_callbacks.core.distributions import Distribution
from sparse_callbacks.core.hooks import BatchEnd, Figures
from sparse_callbacks.core.host import Forward, TrainsInTurns
from sparse_callbacks.core.initial_masks import InitialMask, StartsSparse
from sparse_callbacks.core.method import Options
from sparse_callbacks.core.randomness import seed_everything
from sparse_callbacks.core.record.multiply_adds import WeightsInStep
from sparse_callbacks.core.rescaling import Rescale
from sparse_callbacks.core.running_statistics import norms_with_statistics, renew_statistics
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.storages.storage import why_no_exchange
from sparse_callbacks.core.topology import Update
from sparse_callbacks.methods.gap import worker_schedule
from sparse_callbacks.methods.gap.gap import GaP, Init
from sparse_callbacks.methods.gap.partitions import Partitions, number_of
from sparse_callbacks.methods.gap.round_networks import RoundNetworks, load_tensors
from sparse_callbacks.methods.gap.worker_schedule import WorkerSchedule


class ParallelGaP(TrainsInTurns, GaP):
    """P-GaP: a worker for each partition trains it dense, and their parts are put together (Ma et al., 2022).

    The layers form ``kappa`` partitions. In each round ``kappa`` workers start from the same sparse network; in worker
    i partition i is dense, its pruned weights growing from zero, and the others keep their masks. After ``epochs``
    epochs each::

        combine  every tensor (weights, biases, norms, buffers) from the worker whose partition holds it
        prune    all partitions to the largest |w| of each layer, all but floor(s * size)
        estimate the running statistics of norms anew, in a pass over the training data

    After ``rounds`` rounds fine-tuning goes on with these masks. Optimizers and schedules start anew for each worker
    and for fine-tuning, as in :class:`~sparse_callbacks.GaP`; ``sparse_callbacks.horizon(self.trainer)`` gives their
    optimizer steps.

    In one process the workers train one after another: the first ``rounds * kappa * epochs`` epochs of the run. With
    ``Trainer(devices=kappa, strategy="ddp", use_distributed_sampler=False)`` there is one in each process, and it is
    the first ``rounds * epochs`` epochs; gradients are not averaged until fine-tuning. Both give the same network:
    random numbers and the order of the data derive from (seed, round, worker, epoch of the worker), the latter through
    the sampler's ``set_epoch`` (or torch's global generator, which plain ``shuffle=True`` draws from). A checkpoint
    within a round holds what resume needs of every worker. Logged values and validations within a round are those of
    one worker (of rank 0), at its end of the combined network; norms in eval mode keep their running statistics.

    Passes over the weights in a step: 1 in place (the mask on the weights) and 1 that reads
    (gradients, for inf and NaN).

    Differs from the paper and its code: the released script copies hard-coded layers and leaves the rest as in the file
    that was loaded first; here every tensor has one owner (a tensor that no partition holds comes from worker 0; a
    module without sparse weights, such as a norm, belongs to the partition of the last sparse layer before it). Exactly
    floor(s * size) weights are pruned.

    Args:
        sparsity: fraction of zeros over the selected weights at the end, in [0, 1); None: 0.9, or what ``initial_mask`` holds.
        partitions: their number, which is that of the workers, or how layers are divided, as in :class:`~sparse_callbacks.GaP`.
        rounds: how often each partition becomes dense.
        epochs: whole epochs that each worker trains in a round.
        distribution: how layers share the sparsity: a name such as ``"uniform"``, a mapping ``{glob: sparsity or name}``, a callable
            or an object; see :class:`~sparse_callbacks.core.method.Method`.
        init: masks of the sparse partitions at the start, ``"random"`` or ``"magnitude"``; another name of ``initial_mask``.
        initial_mask: where the first masks lie: ``"random"``, ``"magnitude"``, a score such as ``"snip"``, ``"nonzero"``, the path of a
            checkpoint, or a state dict; see :class:`~sparse_callbacks.core.initial_masks.StartsSparse`.
        rescale: ``"layer"`` or ``"fan_in"``: active weights of a new run are made larger once, to make up for the inputs that are
            gone; None: they stay as they are.
        forward: function of the module and a batch for the pass over the data; None: ``module(batch)``,
            ``module(batch[0])`` or ``module(**batch)`` by the batch's type. Not asked for in a model without running
            statistics.
        statistics_dataloader: batches for that pass; None: the training data in order.
        include: glob, or globs, on the names of parameters that become sparse; None: the weights of all supported layers except
            embeddings.
        exclude: glob, or globs, on the names of parameters that stay dense.
        seed: whole number from which everything random derives, together with the step and the parameter's name.
        **options: ``keep_dense``, ``print_plan`` and ``fresh_start``; see :class:`~sparse_callbacks.core.method.Options`.

    Raises:
        ValueError: as in :class:`~sparse_callbacks.GaP`; more processes than one that are not one for each partition,
            or that split the data, or whose gradients or batch statistics cannot be kept apart.

    Example:
        >>> from sparse_callbacks import ParallelGaP
        >>> ParallelGaP(sparsity=0.9, partitions=2, rounds=3).phases
        6

    Reference: Ma, Qin, Sun, Hou, Yuan, Xu, Wang, Chen, Jin, Xie: Effective model sparsification by scheduled
    grow-and-prune methods. ICLR 2022, arXiv 2106.09857.
    """

    figure_prefix: ClassVar[str] = "gap"
    explores: ClassVar[bool] = False

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        partitions: Partitions = 3,
        rounds: int = 1,
        epochs: int = 1,
        distribution: Distribution = "uniform",
        init: Init | None = None,
        initial_mask: InitialMask = "random",
        rescale: Rescale | None = None,
        forward: Forward | None = None,
        statistics_dataloader: Any | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            sparsity,
            partitions=partitions,
            rounds=rounds,
            epochs=epochs,
            distribution=distribution,
            init=init,
            initial_mask=initial_mask,
            rescale=rescale,
            include=include,
            exclude=exclude,
            seed=seed,
            **options,
        )
        worker_schedule.refuse_parts_of_epochs(epochs)
        self._epochs: int = int(epochs)
        self.epochs = self._epochs
        self.forward: Forward | None = forward
        self.statistics_dataloader: Any | None = statistics_dataloader
        self._mine: Mapping[str, Any] = {}  # this rank's part of a checkpoint, from own_state to begin_training

    # ------------------------------------------------------------------ who trains when

    @property
    def workers(self) -> int:
        """Number of workers, one for each partition."""
        return number_of(self.partitions)

    @property
    def together(self) -> bool:
        """The workers train at once, one on each rank."""
        return distributed.world_size() > 1

    @property
    def _schedule(self) -> WorkerSchedule:
        # made anew each time: the processes are known only once the run has begun, and a resume may have others
        ranks, rank = distributed.world_size(), distributed.rank()
        return WorkerSchedule(self.rounds, self.workers, self._epochs, ranks, rank)

    @property
    def _networks(self) -> RoundNetworks:
        return RoundNetworks(self.model, self.aux, self.together)

    @property
    def phases(self) -> int:
        """Phases before fine-tuning, each of ``epochs`` epochs of the run."""
        return self._schedule.phases

    @property
    def phase(self) -> int:
        """Phase now, from 0; ``phases`` while fine-tuning."""
        return self._schedule.phase_after(int(self.aux.get("workers/epochs", 0)))

    def phase_at(self, number: int) -> int:
        return self.phase  # phases end with epochs, whatever the number of steps in them

    @property
    def dense_partition(self) -> int | None:
        worker = self._schedule.turn(self.phase)[1]
        return None if worker < 0 else worker

    @property
    def at_target(self) -> bool:
        return bool(self.masks) and self.phase == self.phases

    def life(self, times: Calendar, aux: Mapping[str, Tensor]) -> float:
        done = int(aux["workers/epochs"]) if "workers/epochs" in aux else 0
        if done // self._epochs < self.phases:
            return times.every
        return super().life(times, {**aux, "phase/optimizers": aux["workers/finetune"]})

    # ------------------------------------------------------------------ random numbers and data order

    def _seed(self, epoch: int) -> int:
        """Of the run's epoch ``epoch``, by round, worker and the epoch within the worker's."""
        # derived from worker and epoch, so that one process and several draw the same, also after a resume
        turn, worker, within = self._schedule.place(epoch + int(self.aux["workers/offset"]))
        return self.generator(f"data/{turn}/{worker}", within).initial_seed()

    def data_epoch(self, epoch: int) -> int:
        """Number that the order of the data derives from: for the sampler's ``set_epoch``.

        Args:
            epoch: number of the epoch in the run, from 0.
        """
        return self._seed(epoch) % 2**31

    def epoch_start(self, epoch: int) -> None:
        seed_everything(self._seed(epoch))  # for what draws the data

    def window_start(self, batch: int) -> None:
        # not when the phase before ends: the validation between is that of its worker, or of the combined network
        if batch == 0 and self.phase < self.phases and self._begun != self.phase:
            self._begin_worker()
        if batch == 0:  # for the network; resumed at the end of an epoch, Lightning does not announce the next one
            seed_everything(self._seed(int(self.aux["workers/epochs"] - self.aux["workers/offset"])))

    # ------------------------------------------------------------------ the run

    def initial_masks(self) -> dict[str, Tensor]:
        return StartsSparse.initial_masks(self)  # none of the network is dense before the first worker begins

    def make_calendar(self, run: RunLength) -> Calendar:
        worker_schedule.refuse_unknown_epochs(run)
        return super().make_calendar(run)

    def optimizers_are_old(self, phase: int, configured: int) -> bool:
        # phases end with epochs here, so the epochs decide and not the steps of the calendar
        return int(self.aux.get("workers/configured", 0)) != self.phase

    def begin_optimizer_life(self) -> None:
        super().begin_optimizer_life()
        self.aux["workers/configured"] = torch.tensor(self.phase)

    def begin_training(self, epoch: int) -> Figures:
        if "workers/epochs" not in self.aux:
            self.aux["workers/epochs"] = torch.tensor(0)
            self.aux["workers/ranks"] = torch.tensor(distributed.world_size())
            self._networks.keep_start(self.masks)
            self._begin_worker()
        figures = super().begin_training(epoch)
        if self.saved is None:
            # a second fit of the same callback counts its epochs from 0 again
            self.aux["workers/offset"] = self.aux["workers/epochs"] - epoch
        if self._mine:
            self._load_worker()
            for optimizer, state in zip(self.owners.optimizers, self._mine["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.turns_host.load_loader_states(self._mine["loaders"])
            self._mine = {}
        self.turns_host.average_gradients(self.phase == self.phases)
        return figures

    def rehearse(self) -> None:
        if self.phase < self.phases and norms_with_statistics(self.model):
            # a batch shows whether the model can be called as forward= says, before a round has been spent
            with closing(self._pass()) as outputs:
                next(outputs, None)

    def _pass(self, train: Sequence[nn.Module] = ()) -> Generator[Any, None, None]:
        return self.host.data_pass(forward=self.forward, loader=self.statistics_dataloader, train=train)

    def weights_in_step(self, step: Step) -> WeightsInStep:
        counts = super().weights_in_step(step)
        if not self.trains_apart:
            return counts
        # each process trains a worker whose own partition is dense: what they cost on average, to half a weight of a layer
        zeros = self.parameter_zeros(self.entries, self.targets)
        sizes, workers = {n: self.weights.size(n) for n in self.params}, self.workers
        mean = {n: round(size - zeros[n] * (workers - 1) / workers) for n, size in sizes.items()}
        return WeightsInStep(mean, {})

    def after_step(self, step: Step) -> Update | None:
        return None  # phases end with epochs, not with steps

    def batch_end(self, end: BatchEnd) -> Figures:
        if not end.epoch_over:
            return {}
        ended = self.phase
        self.aux["workers/epochs"] = self.aux["workers/epochs"] + 1
        return self._end_phase(ended) if self.phase > ended else {}

    def _end_phase(self, ended: int) -> Figures:
        worker = self._schedule.turn(ended)[1]
        owners = self._networks.owners(self.blocks())
        self._networks.gather(worker, owners)
        if self.together or worker == self.workers - 1:
            self._combine(owners)
        if self.phase == self.phases:
            self._networks.forget()
            self.aux["workers/finetune"] = torch.tensor(self.step)
            self.turns_host.average_gradients(True)
        # counted here: the update comes with an epoch's end, so that no optimizer step brings it
        self.progress.updates += 1
        self.host.request_restart()
        return self.phase_figures(self.phase)

    def phase_figures(self, phase: int) -> dict[str, float]:
        turn, worker = self._schedule.turn(phase)
        return self.own_figures(phase=phase, round=turn, dense_partition=worker)

    def _begin_worker(self) -> None:
        """The start of the round, with this worker's partition dense."""
        self._networks.load_start()
        dense = self.weights.all_active(self.blocks()[self._schedule.turn(self.phase)[1]])
        self.weights.set_masks({**self._networks.masks, **dense})
        self.aux["workers/begun"] = torch.tensor(self.phase)

    @property
    def _begun(self) -> int:
        """The phase whose worker was the last to begin."""
        return int(self.aux.get("workers/begun", -1))

    def _combine(self, owners: Mapping[str, int]) -> None:
        """One network out of all workers, each tensor from its owner, pruned, with its own running statistics."""
        self._networks.load_combined(owners)
        # the statistics come last: those of the pruned network are wanted
        self.weights.set_masks(self.pruned(self.params))
        # those in eval mode are frozen
        norms = [m for m in norms_with_statistics(self.model) if m.training]
        renew_statistics(norms, self._pass, self.host.warn, together=False)
        self._networks.keep_start(self.masks)

    # ------------------------------------------------------------------ checkpoints

    @property
    def trains_apart(self) -> bool:
        """Whether each process trains a worker of its own now, with gradients that are not averaged."""
        return self.together and "workers/epochs" in self.aux and self.phase < self.phases

    def own_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of a saved state that this process goes on from.

        Args:
            state: the saved state, which holds those of all workers.
        """
        worker_schedule.refuse_other_ranks(state["aux"], self._schedule)
        if "workers" not in state:
            return state
        self._mine = worker_schedule.own_part(state["workers"], distributed.world_size(), distributed.rank())
        # checkpoints of older versions have no dense gradients
        return {**state, "grads": self._mine["grads"], "dense_grads": self._mine.get("dense_grads", {})}

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        if self.attachment.host is None:
            return  # no run begins: the model holds the network of rank 0, and the masks are those of this network
        if "workers/epochs" in self.aux:  # also of a run whose state was taken in another number of processes
            worker_schedule.refuse_other_ranks(self.aux, self._schedule)
        if self.trains_apart:
            worker_schedule.refuse_lost_workers(self._mine)

    def _load_worker(self) -> None:
        """The network of this rank as it was saved, in place of rank 0's, which the checkpoint brings to every rank."""
        load_tensors(self.model, self._mine["weights"])
        dense = self.weights.all_active(self.blocks()[distributed.rank()]) if self._begun == self.phase else {}
        self.weights.set_masks({**self._networks.masks, **dense})


@why_no_exchange.register
def _(method: ParallelGaP) -> str:
    return "makes layers dense in turn, so sparse storage has nothing to save"
