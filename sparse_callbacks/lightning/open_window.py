"""Gradients of an accumulation window that is open when a checkpoint is written or read."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.engine import Engine
from sparse_callbacks.core.live.live_records import gathered_records
from sparse_callbacks.core.local_parts import laid_out
from sparse_callbacks.lightning.fit_state import FitState


def put_back(saved: SavedRun | None, fit: FitState, module: nn.Module, engine: Engine) -> None:
    """Give parameters the gradients of a window that was open when the checkpoint was written.

    Args:
        saved: the run that goes on; None for a new one.
        fit: what the callback remembers within the fit; it learns who waits for these gradients.
        module: the module of the fit.
        engine: the engine of the callback, bound to the optimizers of the fit.
    """
    parameters, kept = dict(module.named_parameters()), {}
    fit.window_open, fit.waiting = False, set()
    if saved is not None and saved.grads:
        for name, gradient in saved.grads.items():
            p = parameters[name]
            p.grad = laid_out(gradient, p)
            if (dense := saved.dense_grads.get(name)) is not None:
                kept[name] = p.grad, dense.to(p.device)
        fit.window_open, fit.waiting = saved.window_open, set(range(len(engine.method.owners.optimizers)))
    engine.dense_gradients.put_back(kept)


def state_of_window(
    fit: FitState, engine: Engine, shared: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Any]:
    """What a checkpoint holds of the open window, which is in no checkpoint of Lightning's; empty where none is open.

    Args:
        fit: what the callback remembers within the fit.
        engine: the engine of the callback.
        shared: gives the gradients of one rank as one rank writes them for all.
    """
    # of any optimizer: another one may have stepped within its window
    if not fit.waiting or engine.method.attachment.model is None:
        return {}
    held = {n: p.grad for n, p in engine.method.model.named_parameters() if p.grad is not None}
    # of exchanged layers, whose gradient of pruned weights cannot be made anew
    records = gathered_records(engine.method.weights.records)
    return {
        "grads": shared(held),
        "dense_grads": shared(engine.dense_gradients.kept),
        "window_open": fit.window_open,
    } | ({"records": records} if records else {})
