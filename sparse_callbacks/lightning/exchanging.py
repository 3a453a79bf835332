"""Sparse storage under a Trainer: layers are exchanged in time, and come back where a fit is refused."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

from pytorch_lightning import LightningModule
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.live.live_masks import exchanged_layers
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.optimizers import parameter_ids
from sparse_callbacks.core.selection import NOT_TRAINED, Entry
from sparse_callbacks.core.storages.exchange import exchange
from sparse_callbacks.core.storages.first_use import FirstUse
from sparse_callbacks.lightning import sharded, spawned
from sparse_callbacks.lightning.averaging import averaging_callbacks
from sparse_callbacks.lightning.fit_state import FitState
from sparse_callbacks.lightning.hidden_calls import call_instead
from sparse_callbacks.lightning.namespaces import Trainer
from sparse_callbacks.lightning.refusals import has_class_named
from sparse_callbacks.lightning.seen_rows import seen_rows

if TYPE_CHECKING:
    from sparse_callbacks.lightning.callback import SparsityCallback


# ---------------------------------------------------------------------- a fit is asked for


def wanted_storages(method: Method) -> set[str]:
    """The storages other than masks that a method is asked for."""
    storage = getattr(method, "storage", "masked")
    return set(storage.values() if isinstance(storage, Mapping) else [storage]) - {"masked"}


def refuse_unfit_trainer(method: Method, trainer: Trainer, module: LightningModule) -> None:
    """Refuse a Trainer under which live weights would not be trained as they should.

    Args:
        method: the method of the fit that begins.
        trainer: its Trainer.
        module: its LightningModule, which an earlier fit may have exchanged layers of.

    Raises:
        ValueError: sparse storage was asked for, or is there, beside averages or under a strategy or precision that it does not
            fit.
    """
    asked = sorted(wanted_storages(method) - {"auto"})
    layers = exchanged_layers(module)
    if not asked and not layers:
        return
    what = f"storage={asked[0]!r}" if asked else f"a SparseLinear ({next(iter(layers))})"
    if why := _why_masked(trainer):
        raise ValueError(f"{what}: {why}. Use storage='masked'; to_dense(module) makes layers dense again.")
    if "sparse" in asked and (why := _why_too_short(trainer)):
        raise ValueError(f"storage='sparse': {why}. Use precision='bf16-mixed', storage='grouped' or storage='masked'.")
    if layers and has_class_named(trainer.strategy.launcher, ("_MultiProcessingLauncher",)):
        raise ValueError(
            f"{next(iter(layers))} is of a SparseLinear, and weights come back from the processes that this Trainer starts into the "
            "places of before. Call to_dense(module) first: its layers are exchanged in those processes, and come back dense."
        )


def _why_masked(trainer: Trainer) -> str:
    """Why no layer can be exchanged under a Trainer; empty where layers can."""
    for callback in averaging_callbacks(trainer):
        return (
            f"{type(callback).__name__} averages what stood at one position of a Parameter, and live weights change their "
            "places"
        )
    if sharded.shards_model(trainer):
        return (
            f"{type(trainer.strategy).__name__} shards parameters, and live weights are not in the shape of their layer"
        )
    return ""


def _why_too_short(trainer: Trainer) -> str:
    """Why a Trainer's precision does not fit layers with storage "sparse"; empty where it does."""
    # layers are converted when the strategy is set up, after they were exchanged
    if trainer.precision in ("16-true", "bf16-true"):
        return f"it computes in float32 and float64, and precision={trainer.precision!r} converts weights to 16 bits"
    return ""


def exchange_before_optimizers(
    trainer: Trainer, module: LightningModule, callbacks: Sequence["SparsityCallback"]
) -> None:
    """Let the fit that begins exchange layers right before its strategy wraps the model and makes the optimizers.

    Then all layers are there, whether they were made in ``__init__``, in ``setup`` or in ``configure_model``, and what a
    checkpoint holds is loaded. No hook comes at that point, so the call of the strategy's ``setup`` is caught. The module
    itself is left alone.

    Args:
        trainer: the Trainer, in ``setup`` of a fit.
        module: its LightningModule.
        callbacks: all sparsity callbacks of the Trainer.
    """

    def setup(set_up: Callable[..., None], *arguments: Any) -> None:
        for callback in callbacks:
            if callback.fit_state.exchanged is None:
                exchange_layers_of(callback, trainer, module, spawned.run_brought(callback, module))
        set_up(*arguments)

    call_instead(trainer, "setup", setup)


def exchange_layers_of(
    callback: "SparsityCallback",
    trainer: Trainer,
    module: LightningModule,
    saved: SavedRun | None,
    why_masked: str = "",
) -> None:
    """Exchange the layers that are to have other storage than masks.

    Args:
        callback: the callback of the fit.
        trainer: its Trainer.
        module: its LightningModule.
        saved: the run that goes on, whose layers and places are taken before its weights are loaded; None for a new one.
        why_masked: why ``"auto"`` leaves all layers masked; empty where times decide.
    """
    device = trainer.strategy.root_device
    # the module is not on another device yet, so that a pass of it over data would fail
    with callback.attachment.begins(callback._host_of(trainer, module) if device.type == "cpu" else None):
        exchanged = exchange(
            callback,
            module,
            rows=partial(seen_rows, trainer, module),
            device=device,
            saved=saved,
            why_masked=why_masked or _why_masked(trainer) or _why_too_short(trainer),
        )
    if exchanged.report:
        rank_zero_info(exchanged.report)
    callback.fit_state.exchanged = exchanged
    callback.fit_state.were_dense |= {name: ref(p) for name, p in exchanged.originals.items()}


# ---------------------------------------------------------------------- its optimizers stand


def refuse_dense_optimizers(callback: "SparsityCallback", trainer: Trainer) -> None:
    """Refuse an optimizer that was made before the layers were exchanged.

    Args:
        callback: the callback of the fit.
        trainer: its Trainer, whose optimizers are set up.

    Raises:
        ValueError: an optimizer holds a Parameter that the model no longer has.
    """
    for optimizer in trainer.optimizers:
        held = parameter_ids(optimizer)
        for name, parameter in callback.fit_state.were_dense.items():
            if id(parameter()) in held:
                raise ValueError(
                    f"{type(optimizer).__name__} holds {name} as it was before storage={callback.storage!r} took the place of its "
                    "layer, and would train a weight that the model no longer has. Make the optimizer within "
                    "configure_optimizers(), from self.parameters() as they are then, or use storage='masked'."
                )


def refuse_idle_layers(callback: "SparsityCallback", entries: Sequence[Entry]) -> None:
    """Refuse to take the pruned weights away from a layer that waits until it is trained, and is dense until then.

    Args:
        callback: the callback of the fit.
        entries: all parameters, with those that no optimizer trains.

    Raises:
        ValueError: a layer was exchanged, and no optimizer has its weight.
    """
    exchanged = callback.fit_state.exchanged
    originals = {} if exchanged is None else exchanged.originals
    if idle := [e.name for e in entries if e.name in originals and e.reason in NOT_TRAINED]:
        raise ValueError(
            f"{', '.join(idle)} in no optimizer: such layers stay dense until they are trained, and storage="
            f"{callback.storage!r} exchanges layers before optimizers are made. Set requires_grad=False for those that are trained "
            "later, or leave them out with exclude=."
        )


# ---------------------------------------------------------------------- training begins, or does not


def watch_first_use(fit: FitState) -> None:
    """The first batch begins: an error is one of training from here on, and the dense layers are let go."""
    exchanged, fit.exchanged = fit.exchanged, None
    assert exchanged is not None
    exchanged.forget()
    fit.first_use = FirstUse(exchanged.layers)


def warn_of_first_use(fit: FitState) -> None:
    """The first batch is over: say which exchanged layers it made no use of, or used otherwise than by calling them."""
    assert fit.first_use is not None
    if text := fit.first_use.warning():
        rank_zero_warn(text)
    fit.first_use = None


def bring_dense_back(fit: FitState) -> None:
    """The fit was refused: the module has the layers again that it came with."""
    exchanged, fit.exchanged = fit.exchanged, None
    if exchanged is not None:
        exchanged.undo()
        for name in exchanged.originals:
            del fit.were_dense[name]
