"""P-GaP: parallel grow-and-prune, with a worker for each part of the network."""

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from numbers import Real
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from sparse_callbacks.core import distributed
from sparse_callbacks.core.calendar import Calendar, RunLength
from sparse_callbacks.core.distributions import Distribution
from sparse_callbacks.core.hooks import BatchEnd, Figures
from sparse_callbacks.core.host import Forward
from sparse_callbacks.core.method import Method, Options
from sparse_callbacks.core.randomness import seed_everything
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.topology import Update
from sparse_callbacks.lightning.turns import TurnTaking
from sparse_callbacks.methods.gap.combination import names_by_partition, tensor_owners
from sparse_callbacks.methods.gap.gap import GaP, Init
from sparse_callbacks.methods.gap.partitions import Partitions, number_of


class ParallelGaP(GaP, TurnTaking):
    """P-GaP, parallel grow-and-prune: a worker for each partition trains it dense, and the best of all is put together
    (Ma et al., 2022).

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

    Differs from the paper and its code: the released script copies hard-coded layers and leaves the rest as in the file
    that was loaded first; here every tensor has one owner (a tensor that no partition holds comes from worker 0; a
    module without sparse weights, such as a norm, belongs to the partition of the last sparse layer before it). Exactly
    floor(s * size) weights are pruned.

    Args:
        sparsity, partitions, rounds, init, distribution, include, exclude, seed, **options: as in
            :class:`~sparse_callbacks.GaP`.
        epochs: whole epochs that each worker trains in a round.
        forward: function of the module and a batch for the pass over the data; None: ``module(batch)``,
            ``module(batch[0])`` or ``module(**batch)`` by the batch's type. Not asked for in a model without running
            statistics.
        statistics_dataloader: batches for that pass; None: the training data in order.

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
        sparsity: float = 0.9,
        *,
        partitions: Partitions = 3,
        rounds: int = 1,
        epochs: int = 1,
        distribution: Distribution = "uniform",
        init: Init = "random",
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
            include=include,
            exclude=exclude,
            seed=seed,
            **options,
        )
        if not isinstance(epochs, Real) or int(epochs) != epochs:
            raise ValueError(
                f"epochs={epochs!r} is no whole number of epochs: a worker's data order begins with an epoch. Give "
                "epochs=1."
            )
        self._epochs: int = int(epochs)
        self.epochs = self._epochs
        self.forward: Forward | None = forward
        self.statistics_dataloader: Any | None = statistics_dataloader
        self._mine: Mapping[str, Any] = {}

    # ------------------------------------------------------------------ who trains when

    @property
    def workers(self) -> int:
        return number_of(self.partitions)

    @property
    def together(self) -> bool:
        """The workers train at once, one on each rank."""
        return distributed.world_size() > 1

    @property
    def phases(self) -> int:
        """Phases before fine-tuning, each of ``epochs`` epochs of the run."""
        return self.rounds if self.together else self.rounds * self.workers

    def _turn(self, phase: int) -> tuple[int, int]:
        """Round and worker of a phase; in fine-tuning the round after the last and no worker (-1)."""
        if phase >= self.phases:
            return self.rounds, -1
        return (phase, distributed.rank()) if self.together else divmod(phase, self.workers)

    @property
    def phase(self) -> int:
        """Phase now, from 0; ``phases`` while fine-tuning."""
        return min(int(self.aux.get("workers/epochs", torch.tensor(0))) // self._epochs, self.phases)

    def phase_at(self, number: int) -> int:
        return self.phase

    @property
    def dense_partition(self) -> int | None:
        worker = self._turn(self.phase)[1]
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
        epoch += int(self.aux["workers/offset"])
        turn, worker = self._turn(epoch // self._epochs)
        within = epoch % self._epochs if worker >= 0 else epoch - self.phases * self._epochs
        return self.generator(f"data/{turn}/{worker}", within).initial_seed()

    def data_epoch(self, epoch: int) -> int:
        return self._seed(epoch) % 2**31

    def epoch_start(self, epoch: int) -> None:
        seed_everything(self._seed(epoch))  # for what draws the data

    def window_start(self, batch: int) -> None:
        if batch == 0 and self.phase < self.phases and self._begun != self.phase:
            self._begin_worker()  # not at once: the validation between is that of the worker before, or of the combined network
        if batch == 0:  # for the network; resumed at the end of an epoch, Lightning does not announce the next one
            seed_everything(self._seed(int(self.aux["workers/epochs"] - self.aux["workers/offset"])))

    # ------------------------------------------------------------------ the run

    def initial_masks(self) -> dict[str, Tensor]:
        return self.pruned(self.params) if self.init == "magnitude" else Method.initial_masks(self)

    def make_calendar(self, run: RunLength) -> Calendar:
        if math.isinf(run.epoch()):
            raise ValueError(
                "ParallelGaP counts whole epochs, and the train loader has no length. Give one that has, or "
                "Trainer(limit_train_batches=N)."
            )
        return super().make_calendar(run)

    def optimizers_are_old(self, phase: int, configured: int) -> bool:
        # phases end with epochs here, so the epochs decide and not the steps of the calendar
        return int(self.aux.get("workers/configured", torch.tensor(0))) != self.phase

    def begin_optimizer_life(self) -> None:
        super().begin_optimizer_life()
        self.aux["workers/configured"] = torch.tensor(self.phase)

    def begin_training(self, epoch: int) -> Figures:
        if "workers/epochs" not in self.aux:
            self.aux["workers/epochs"] = torch.tensor(0)
            self.aux["workers/ranks"] = torch.tensor(distributed.world_size())
            self._keep("sparse", self.masks)
            if not self.together:
                self._keep("start", self._tensors())
            self._begin_worker()
        figures = super().begin_training(epoch)
        if self.saved is None:
            self.aux["workers/offset"] = self.aux["workers/epochs"] - epoch
        if self._mine:
            for optimizer, state in zip(self.owners.optimizers, self._mine["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.turns_host.load_loader_states(self._mine["loaders"])
            self._mine = {}
        self.turns_host.average_gradients(self.phase == self.phases)
        return figures

    def rehearse(self) -> None:
        if self.phase < self.phases and _with_statistics(self.model):
            with closing(self._pass()) as outputs:
                next(outputs, None)

    def _pass(self, train: Sequence[nn.Module] = ()) -> Generator[Any, None, None]:
        return self.host.data_pass(forward=self.forward, loader=self.statistics_dataloader, train=train)

    def after_step(self, step: Step) -> Update | None:
        return None  # phases end with epochs, not with steps

    def batch_end(self, end: BatchEnd) -> Figures:
        if not end.epoch_over:
            return {}
        ended = self.phase
        self.aux["workers/epochs"] = self.aux["workers/epochs"] + 1
        return self._end_phase(ended) if self.phase > ended else {}

    def _end_phase(self, ended: int) -> Figures:
        worker = self._turn(ended)[1]
        owner = self._owners()
        if not self.together:
            self._keep("gathered", {k: t for k, t in self._tensors().items() if owner[k] == worker})
        if self.together or worker == self.workers - 1:
            self._combine(owner)
        if self.phase == self.phases:
            self._drop("sparse")
            self._drop("start")
            self.aux["workers/finetune"] = torch.tensor(self.step)
            self.turns_host.average_gradients(True)
        self.progress.updates += 1
        self.host.request_restart()
        return self.phase_figures(self.phase)

    def phase_figures(self, phase: int) -> dict[str, float]:
        turn, worker = self._turn(phase)
        return self.own_figures(phase=phase, round=turn, dense_partition=worker)

    def _begin_worker(self) -> None:
        """The start of the round, with this worker's partition dense."""
        if not self.together:
            self._take_over(self._kept("start"))
        dense = self.weights.all_active(self.blocks()[self._turn(self.phase)[1]])
        self.weights.set_masks({**self._kept("sparse"), **dense})
        self.aux["workers/begun"] = torch.tensor(self.phase)

    @property
    def _begun(self) -> int:
        """The phase whose worker was the last to begin."""
        return int(self.aux.get("workers/begun", torch.tensor(-1)))

    def _combine(self, owner: Mapping[str, int]) -> None:
        """One network out of all workers, pruned, with its own running statistics."""
        tensors = self._tensors()
        gathered = distributed.from_owners(tensors, owner) if self.together else self._kept("gathered")
        self._take_over(gathered)
        self.weights.set_masks(self.pruned(self.params))
        self._estimate_statistics()
        self._keep("sparse", self.masks)
        if not self.together:
            self._drop("gathered")
            self._keep("start", self._tensors())

    def _estimate_statistics(self) -> None:
        norms = [m for m in _with_statistics(self.model) if m.training]  # those in eval mode are frozen
        momenta = [m.momentum for m in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean, batch by batch
        try:
            for _ in self._pass(train=norms) if norms else ():
                pass  # the forward passes are all that is wanted
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum

    # ------------------------------------------------------------------ tensors that wait

    def _tensors(self) -> dict[str, Tensor]:
        return {k: t.detach() for k, t in self.model.state_dict().items() if isinstance(t, Tensor)}

    def _owners(self) -> dict[str, int]:
        tensors = self._tensors()
        return tensor_owners(tensors, names_by_partition(tensors, self.blocks()))

    def _take_over(self, tensors: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict({**self.model.state_dict(), **tensors})

    def _keep(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        self.aux |= {f"{kind}/{k}": t.detach().clone() for k, t in tensors.items()}

    def _kept(self, kind: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{kind}/"): t for k, t in self.aux.items() if k.startswith(f"{kind}/")}

    def _drop(self, kind: str) -> None:
        self.aux = {k: t for k, t in self.aux.items() if not k.startswith(f"{kind}/")}

    # ------------------------------------------------------------------ checkpoints

    @property
    def trains_apart(self) -> bool:
        return self.together and "workers/epochs" in self.aux and self.phase < self.phases

    def own_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        ranks = int(state["aux"].get("workers/ranks", distributed.world_size()))
        if (
            ranks != distributed.world_size()
            and int(state["aux"]["workers/epochs"]) < self._epochs * self.rounds * self.workers // ranks
        ):
            raise ValueError(
                f"the checkpoint was written within a round by {ranks} processes, and this run has "
                f"{distributed.world_size()}: the "
                f"workers would not be the same. Resume with devices={ranks}."
            )
        if "workers" not in state:
            return state
        self._mine = state["workers"][distributed.rank()]
        return {**state, "grads": self._mine["grads"]}

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        if not self.trains_apart:
            return
        if not self._mine:
            raise ValueError(
                "the last fit ended within a round, and the processes have lost the networks of their workers since. "
                "Resume it from a "
                "checkpoint that was written in training (ckpt_path=), or give fresh_start=True."
            )
        self._take_over(self._mine["weights"])
        dense = self.weights.all_active(self.blocks()[distributed.rank()]) if self._begun == self.phase else {}
        self.weights.set_masks({**self._kept("sparse"), **dense})


def _with_statistics(model: nn.Module) -> list[_NormBase]:
    """Norms that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
