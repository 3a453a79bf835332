"""Fresh initial weights for layers, by the ``reset_parameters()`` of their modules."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from sparse_callbacks.core.randomness import random_states, restore_random_states, seed_restorable


def modules_holding(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules that hold parameters, by the modules' names.

    Args:
        model: the model.
        names: names of the parameters.
    """
    return {holder: model.get_submodule(holder) for holder in dict.fromkeys(n.rpartition(".")[0] for n in names)}


def refuse_unresettable(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse layers that cannot make fresh initial weights.

    Args:
        model: the model.
        names: names of the parameters that are to be made anew.

    Raises:
        ValueError: a module has no ``reset_parameters()``.
    """
    lacking = {
        f"{name} ({type(module).__name__})" if name else type(module).__name__
        for name, module in modules_holding(model, names).items()
        if not callable(getattr(module, "reset_parameters", None))
    }
    if lacking:
        raise ValueError(
            f"reinit_after=True makes fresh initial weights by reset_parameters(), which {', '.join(sorted(lacking))} lacks. "
            "Leave reinit_after= out, or leave the layer out with exclude=."
        )


def reset_weights(model: nn.Module, names: Iterable[str], seed: int) -> None:
    """Give layers fresh initial weights, biases included; frozen parameters stay, and so do all random states.

    Args:
        model: the model.
        names: names of the parameters whose layers are made anew.
        seed: of the new weights, which are the same on every rank.
    """
    states = random_states()
    try:
        seed_restorable(seed)
        for module in modules_holding(model, names).values():
            frozen = {n: p.detach().clone() for n, p in module.named_parameters(recurse=False) if not p.requires_grad}
            reset = getattr(module, "reset_parameters")  # noqa: B009  # a module of any class
            reset()
            if frozen:
                module.load_state_dict(frozen, strict=False)
    finally:
        restore_random_states(states)


class LayersBefore:
    """Values of layers that are about to be made anew, for a run that is refused.

    Args:
        model: the model.
        names: names of the parameters whose layers are kept.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._kept: list[tuple[nn.Module, Mapping[str, Tensor]]] = [
            (m, {k: t.clone() for k, t in m.state_dict().items()}) for m in modules_holding(model, names).values()
        ]

    def bring_back(self) -> None:
        """Give the layers their values again."""
        for module, values in self._kept:
            module.load_state_dict(values)
