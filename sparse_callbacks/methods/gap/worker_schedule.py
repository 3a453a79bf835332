"""Schedule of parallel grow-and-prune: which worker trains in which epoch of the run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from sparse_callbacks.core.calendar import RunLength
from sparse_callbacks.core.state_layout import damaged, shown_short


@dataclass(frozen=True)
class WorkerSchedule:
    """Rounds of workers, which train at once on as many ranks, or one after another in one process.

    Args:
        rounds: number of rounds.
        workers: number of workers in each round.
        epochs: epochs that each worker trains in a round.
        ranks: number of processes, 1 or ``workers``.
        rank: index of this process.
    """

    rounds: int
    workers: int
    epochs: int
    ranks: int
    rank: int

    @property
    def phases(self) -> int:
        """Phases before fine-tuning, each of ``epochs`` epochs of the run: rounds, or the turns of workers."""
        return self.rounds if self.ranks > 1 else self.rounds * self.workers

    def phase_after(self, epochs: int) -> int:
        """Phase after ``epochs`` epochs, from 0; :attr:`phases` while fine-tuning."""
        return min(epochs // self.epochs, self.phases)

    def turn(self, phase: int) -> tuple[int, int]:
        """Round and worker of a phase; in fine-tuning the round after the last and no worker (-1)."""
        if phase >= self.phases:
            return self.rounds, -1
        return (phase, self.rank) if self.ranks > 1 else divmod(phase, self.workers)

    def place(self, epoch: int) -> tuple[int, int, int]:
        """Round, worker and the epoch within the worker's own, of an epoch of the run; all counted from 0."""
        turn, worker = self.turn(epoch // self.epochs)
        return turn, worker, epoch % self.epochs if worker >= 0 else epoch - self.phases * self.epochs


def refuse_parts_of_epochs(epochs: float) -> None:
    """Refuse a length of a phase that is not a whole number of epochs.

    Raises:
        ValueError: ``epochs`` has a fractional part.
    """
    if not isinstance(epochs, Real) or int(epochs) != epochs:
        raise ValueError(
            f"epochs={epochs!r} is not a whole number of epochs: a worker's data order begins with an epoch. Give "
            "epochs=1."
        )


def refuse_unknown_epochs(run: RunLength) -> None:
    """Refuse a run whose epochs have no known length.

    Raises:
        ValueError: the train loader has no length.
    """
    if math.isinf(run.epoch()):
        raise ValueError(
            "ParallelGaP counts whole epochs, and the train loader has no length. Give one that has, or "
            "Trainer(limit_train_batches=N)."
        )


def refuse_lost_workers(mine: Mapping[str, object]) -> None:
    """Refuse to go on within a round on several ranks without their networks.

    Args:
        mine: this rank's part of a checkpoint; empty without a checkpoint.

    Raises:
        ValueError: ``mine`` is empty.
    """
    if not mine:
        raise ValueError(
            "the last fit ended within a round, and the processes have lost the networks of their workers since. "
            "Resume it from a checkpoint that was written in training (ckpt_path=), or give fresh_start=True."
        )


def refuse_other_ranks(aux: Mapping[str, Tensor], schedule: WorkerSchedule) -> None:
    """Refuse to resume within a round on another number of processes.

    Args:
        aux: tensors of the checkpoint.
        schedule: the schedule of this run.

    Raises:
        ValueError: the checkpoint was written within a round, by another number of processes.
    """
    ranks = int(aux.get("workers/ranks", schedule.ranks))
    epochs = schedule.epochs * schedule.rounds * schedule.workers  # of all workers together
    # in fine-tuning there is one network, which any number of processes can go on with
    if ranks != schedule.ranks and int(aux["workers/epochs"]) < epochs // ranks:
        raise ValueError(
            f"the checkpoint was written within a round by {ranks} processes, and this run has {schedule.ranks}: the "
            f"workers would not be the same. Resume with devices={ranks}."
        )


_OF_A_WORKER: Mapping[str, type] = {"weights": Mapping, "optimizers": list, "loaders": list, "grads": Mapping}


def own_part(workers: Any, ranks: int, rank: int) -> Mapping[str, Any]:
    """The network of this rank's worker, and what else it trains with, in a checkpoint.

    Args:
        workers: what the checkpoint holds of all workers.
        ranks: the number of processes.
        rank: the number of this one.

    Raises:
        ValueError: the workers are damaged.
    """
    if not isinstance(workers, list) or len(workers) != ranks:
        raise damaged("that is resumed", f"its 'workers' are {shown_short(workers)}, and there are {ranks} processes")
    for worker in workers:
        kept = isinstance(worker, Mapping) and all(isinstance(worker.get(k), t) for k, t in _OF_A_WORKER.items())
        if not kept:
            raise damaged("that is resumed", f"a worker in it is {shown_short(worker)} without its network")
    mine: Mapping[str, Any] = workers[rank]
    return mine
