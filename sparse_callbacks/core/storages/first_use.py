"""Whether the first batch of a run makes use of exchanged layers, and by calling them."""

from collections.abc import Mapping
from typing import Any
from weakref import finalize, ref

import torch
from torch import Tensor, nn

from sparse_callbacks.core.live.uncompiled import run_uncompiled
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear


class FirstUse:
    """Looks at exchanged layers from the beginning of the first batch until `warning` is asked for.

    A layer is used where it is called, or where a gradient reaches its live values: in a compiled model no hook of a layer
    says that it was called.

    Args:
        layers: the exchanged layers by the name of their weight.
    """

    def __init__(self, layers: Mapping[str, SparseLinear]) -> None:
        self._layers, self._used = dict(layers), set[str]()
        self._handles: list[Any] = []
        for name, layer in self._layers.items():
            layer.weight_was_read = False
            # planted on layers that train for hours: of a compiled model a hook would stay in the graph
            if layer.values.requires_grad:
                values: Any = layer.values
                self._handles.append(values.register_post_accumulate_grad_hook(self._noting(name)))
            self._handles.append(layer.register_forward_pre_hook(self._noting_call(name, ref(layer))))
        # of a run that nobody has closed, whose model may live on
        finalize(self, _take_away, self._handles).atexit = False
        # torch would compile once with these hooks and once without
        self._compile_again = run_uncompiled(self) if self._handles else None

    def _noting(self, name: str) -> Any:
        used = self._used  # and not self, which would never be collected: see `_PassOver` in live_records

        def note(_: Tensor) -> None:
            used.add(name)

        return note

    def _noting_call(self, name: str, layer: "ref[SparseLinear]") -> Any:
        used = self._used

        def note(called: nn.Module, _: Any) -> None:
            # the layer whose place it has taken shares its hooks
            if not torch.compiler.is_compiling() and called is layer():
                used.add(name)

        return note

    def step_over(self) -> None:
        """The first step was taken: compiled models may run compiled, also where another optimizer never steps."""
        if self._compile_again is not None:
            self._compile_again()

    def end(self) -> None:
        """Look no more."""
        self.step_over()
        _take_away(self._handles)

    def warning(self) -> str:
        """The first batch is over: which layers it has not used, or used otherwise; empty where all is well."""
        self.end()
        texts = []
        if unused := [name for name in self._layers if name not in self._used]:
            texts.append(
                f"the first batch did not call layers with sparse storage ({', '.join(unused)}): what computes with another "
                "reference to these layers, or with their dense weights, does not train them. Leave them out with exclude=, "
                "or give storage='masked'."
            )
        if read := [name for name, layer in self._layers.items() if layer.weight_was_read]:
            texts.append(
                f"something reads {', '.join(read)}, and each time a dense matrix is made of the live weights. It is a copy: what "
                "is written into it is lost. Call the layer, use its values, or give storage='masked'."
            )
        return " ".join(texts)


def _take_away(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
