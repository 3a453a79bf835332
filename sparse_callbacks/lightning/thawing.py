"""Layers that a Trainer has begun to train since the fit began, as finetuning callbacks thaw them."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from pytorch_lightning import LightningModule
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from sparse_callbacks.core import distributed
from sparse_callbacks.core.awaited import AWAITED, why_never
from sparse_callbacks.core.optimizers import parameter_ids
from sparse_callbacks.core.thawed import have_moved, thawed_names
from sparse_callbacks.core.unseen_steps import StepWatch
from sparse_callbacks.lightning.namespaces import Trainer
from sparse_callbacks.lightning.refusals import has_class_named
from sparse_callbacks.lightning.trainer_optimizers import TrainerOptimizers

if TYPE_CHECKING:
    from sparse_callbacks.lightning.callback import SparsityCallback


def follow_training(
    trainer: Trainer, module: LightningModule, callback: "SparsityCallback", peers: Sequence["SparsityCallback"]
) -> None:
    """The first batch of an epoch, or of a resumed fit: layers that are trained now become sparse, and parameters that
    were moved are followed to their optimizers.

    Args:
        trainer: the Trainer of the fit.
        module: its module.
        callback: whose layers these are.
        peers: all sparsity callbacks of the Trainer.
    """
    engine, fit, given = callback.engine, callback.fit_state, list(trainer.optimizers)
    trained = parameter_ids(*given)
    _warn_of_dense(module, callback, trained)
    trained -= {id(p) for peer in peers if peer is not callback for p in peer.params.values()}
    same = list(map(id, given)) == list(map(id, fit.given))
    thawed = thawed_names(callback, trained)
    if same and not thawed and not have_moved(callback, callback.owners.optimizers):
        return  # so that optimizers that are not torch's need not be tried anew in each epoch
    fit.given, optimizers = given, TrainerOptimizers(trainer, module)
    _refuse_unreduced(callback, thawed)
    found = engine.take_up(trained, optimizers.steppers, optimizers.gradients_read, optimizers.two_pass)
    if found is None:
        return
    engine.announce_by_hooks()
    if found:
        fit.watch = StepWatch(engine)
        shown = found[0] if len(found) == 1 else f"{found[0]} to {found[-1]} ({len(found)})"
        rank_zero_info(f"{type(callback).__name__}: trained from here on, and sparse: {shown}.")


def _warn_of_dense(module: LightningModule, callback: "SparsityCallback", trained: Collection[int]) -> None:
    """Say which parameters are trained only now, where the method takes up no layer after its run has begun."""
    fit, parameters = callback.fit_state, dict(module.named_parameters())
    late = [n for n in fit.left_out if parameters[n].requires_grad and id(parameters[n]) in trained]
    if late:
        fit.left_out = [n for n in fit.left_out if n not in late]
        rank_zero_warn(
            f"{type(callback).__name__} leaves {', '.join(late)} dense: they were frozen or in no optimizer when fit "
            f"started and are trained only now, and {why_never(callback)}. To make them sparse, train them from the start "
            "of a fit."
        )


def warn_of_thaw_to_come(trainer: Trainer, callback: "SparsityCallback") -> None:
    """Say before the first batch that a finetuning callback must not thaw layers within this fit."""
    frozen = [e.name for e in callback.entries if e.reason == AWAITED[0]]
    thaws = [c for c in trainer.callbacks if has_class_named(c, ("BaseFinetuning",))]
    if frozen and thaws and distributed.world_size() > 1:
        rank_zero_warn(
            f"{', '.join(frozen)} are frozen, and DistributedDataParallel does not average the gradients of what "
            f"{type(thaws[0]).__name__} thaws within this fit: {type(callback).__name__} ends it there with an error, as the "
            "processes would train them apart. Thaw them between two fits, or leave them out with exclude=."
        )


def _refuse_unreduced(callback: "SparsityCallback", thawed: Collection[str]) -> None:
    """Refuse layers that the processes would train apart.

    Raises:
        RuntimeError: DistributedDataParallel does not know a layer that is trained from here on.
    """
    frozen = {e.name for e in callback.entries if e.reason == AWAITED[0]}
    unknown = [n for n in thawed if n in frozen]
    if unknown and distributed.world_size() > 1:
        raise RuntimeError(
            f"{', '.join(unknown)} were frozen when DistributedDataParallel took hold of the model, so it does not average "
            "their gradients, and the processes would train them apart. Thaw them between two fits: the second takes hold "
            "of the model anew, and goes on with this callback. (BackboneFinetuning thaws within one.)"
        )
