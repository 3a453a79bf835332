"""The signals of the first batch: whether they fade on their way to the last sparse layer."""

from collections.abc import Sequence
from typing import Any
from weakref import finalize, ref

import torch
from torch import Tensor, nn

from sparse_callbacks.core.method import Method
from sparse_callbacks.core.record.find_chain import LayerCall, find_chain
from sparse_callbacks.core.selection import is_norm
from sparse_callbacks.core.undisturbed import no_training

SIGNAL_LEFT = 1e-2
"""Share of the standard deviation of a signal that must be left of it."""


class FirstSignals:
    """Watches the sparse layers in the first forward pass with gradients, until :meth:`end`.

    Where compiled code calls the layers nothing is seen; what is known to be compiled gets no hooks (see
    :func:`~sparse_callbacks.core.inspection.is_compiled`).

    Args:
        method: the method of a run that begins.
    """

    def __init__(self, method: Method) -> None:
        self._method = method
        self._calls: list[LayerCall] = []
        self._spreads: list[tuple[str, Tensor]] = []
        self._is_over = False
        self._handles = [
            method.model.get_submodule(name.rpartition(".")[0]).register_forward_hook(_Hook(name, self))
            for name in method.params
            if name.endswith("weight")  # of other parameters there is more than one in a layer
        ]
        # of a run that nobody has closed, whose model may live on
        finalize(self, _take_away, self._handles).atexit = False

    def called(self, name: str, args: tuple[Any, ...], output: Any) -> None:
        """A layer was called."""
        # within a backward pass a checkpoint computes layers again
        if (
            self._is_over
            or no_training()
            or torch._C._current_graph_task_id() != -1
            or not getattr(output, "requires_grad", False)
        ):
            return
        if not args or not isinstance(args[0], Tensor):
            return
        if not self._calls:
            output.register_hook(_BackwardComes(self))
        self._calls.append(LayerCall.of(name, args[0], output))
        self._spreads.append((name, spread_of_samples(args[0])))

    def backward_comes(self) -> None:
        """The backward pass has begun: what is called from here on is of another pass."""
        self._is_over = True

    def end(self) -> None:
        """Look no more."""
        _take_away(self._handles)

    def chain(self) -> tuple[str, ...]:
        """Names of the sparse layers' weights from input to output; empty where they are no chain. Ask once."""
        calls, self._calls = self._calls, []  # which hold the graph
        entries = self._method.weights.entries
        return find_chain(calls, [entries[name] for name in self._method.params]).names

    def why_faded(self) -> str:
        """Where the signal of the first batch was lost, as the beginning of a sentence; empty where it was not.

        Compared is by how much samples differ in the inputs of the first sparse layer, and in those of the last: the root of
        the mean over units of the variance over samples. Layers that begin at zero, as the last ones of residual branches may,
        say nothing there; nor does anything where a norm gives signals another scale.
        """
        if len(self._spreads) < 2 or any(map(is_norm, self._method.model.modules())):
            return ""
        (_, first), (name, last) = self._spreads[0], self._spreads[-1]
        given, left = float(first), float(last)  # waits for the device
        if not 0 < given < float("inf") or not left < SIGNAL_LEFT * given:
            return ""
        return (
            f"the signal of the first batch has faded: samples differ {given / left:.0f} times less in the inputs of {name} "
            f"than in those of {self._spreads[0][0]}"
            if left
            else f"the signal of the first batch is gone: all samples look alike to {name}"
        )


class _Hook:
    """The forward hook of a layer. A copy of it, in a copy of the model or a file, goes as soon as it is called."""

    def __init__(self, name: str = "", signals: FirstSignals | None = None) -> None:
        self._name, self._signals = name, None if signals is None else ref(signals)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        signals = None if self._signals is None else self._signals()
        if signals is not None:
            signals.called(self._name, args, output)
            return
        for key in [key for key, hook in module._forward_hooks.items() if hook is self]:
            del module._forward_hooks[key]

    def __reduce__(self) -> Any:
        return _Hook, ()


class _BackwardComes:
    """Tells of a backward pass. It holds what it tells weakly: torch keeps such hooks where Python's collector does not see
    them."""

    def __init__(self, signals: FirstSignals) -> None:
        self._signals = ref(signals)

    def __call__(self, _: Tensor) -> None:
        if (signals := self._signals()) is not None:
            signals.backward_comes()


def _take_away(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()


@torch.no_grad()
def spread_of_samples(x: Tensor) -> Tensor:
    """The root of the mean variance over samples, on the device of ``x``; NaN where inputs are no signals of several samples:
    of a single sample, with or without a dimension of it, of no features, and of numbers that are not floating-point, which
    are names of things rather than amounts."""
    if (
        x.ndim < 2
        or x.shape[0] < 2
        or not x.numel()
        or not x.is_floating_point()
        or x.is_nested
        or x.layout != torch.strided
    ):
        return torch.full((), float("nan"), device=x.device)
    return x.detach().float().flatten(1).var(0).mean().sqrt()
