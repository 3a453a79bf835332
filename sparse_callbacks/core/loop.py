"""Sparse training in a loop that somebody wrote by hand, or in Fabric's: one call before it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from sparse_callbacks.core.host import Forward
from sparse_callbacks.core.loop_driver import Clip
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.sparse_run import SparseRun


def sparsify(
    method: Method,
    model: nn.Module,
    optimizer: Any | Sequence[Any],
    steps: float,
    *,
    epoch: int | None = None,
    data: Any | None = None,
    forward: Forward | None = None,
    clip: Clip | None = None,
    state: Mapping[str, Any] | None = None,
    on_restart: Callable[[], object] | None = None,
) -> SparseRun:
    """Train ``model`` sparse in a loop of your own: one call before the loop, and the optimizer's own hooks do the rest.

    The loop stays as it is: backward, ``optimizer.step()``, ``optimizer.zero_grad()``, with accumulation, a
    ``GradScaler``, several optimizers or ``torch.compile``. Masks are written before this function returns, so a copy of
    the model that is made afterwards (a target network, an average) is sparse too. Two methods on different layers
    are two calls.

    Args:
        method: a method such as ``RigL(0.9)``; it belongs to this run alone.
        model: the module to train, before or after ``fabric.setup``, DistributedDataParallel or ``torch.compile``.
        optimizer: the optimizer, or a list of all optimizers of the loop.
        steps: optimizer steps of the whole run, those before a resume included; ``math.inf`` where nobody knows.
        epoch: optimizer steps of an epoch; default: ``len(data)``. Methods with times in epochs need it.
        data: the loader of the training data, for the methods that look at activations or at one batch: CTRE, SMCP,
            ChannelPruning, and ConstrainedL0 with gated channels.
        forward: a function of the model and a batch of ``data`` that gives the network's output; default: by the
            batch's type, ``model(batch)``, ``model(batch[0])`` or ``model(**batch)``.
        clip: clips the gradients of a list of parameters in place, inside the step, when they are unscaled and
            masked: ``lambda parameters: clip_grad_norm_(parameters, 1.0)``.
        state: what ``run.state_dict()`` gave, to go on from it; load the model and the optimizer first.
        on_restart: called where GaP or EarlyCroP starts its optimizers anew; the loop makes its learning rate schedule again in it.

    Returns:
        The run: its masks, its figures, its state. It may be ignored.

    Raises:
        ValueError: a method, model, optimizer or state that cannot work together; nothing was changed then.

    Example:
        >>> import torch
        >>> from sparse_callbacks import sparsify
        >>> from sparse_callbacks.methods import RigL
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> run = sparsify(RigL(0.75, every=2, print_plan=False), model, optimizer, steps=10)
        >>> for _ in range(10):
        ...     loss = model(torch.randn(4, 8)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> run.step, run.updates
        (6, 4)
    """
    return SparseRun(method, model, optimizer, steps, epoch, data, forward, clip, state, on_restart)
