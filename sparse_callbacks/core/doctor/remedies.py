"""What to do about each warning of the doctor, without what the run does already."""

from collections.abc import Callable, Mapping

from sparse_callbacks.core.method import Method

BY_SHAPE = ("erdos_renyi", "erdos_renyi_kernel")
"""Distributions that give small layers more of the weights."""


def remedy(name: str, method: Method) -> str:
    """What to do about a warning, as sentences.

    Args:
        name: the name of its check, a key of :data:`REMEDIES`.
        method: the method of the run, whose arguments and optimizers may follow a part of the advice already.
    """
    found = REMEDIES[name]
    return found if isinstance(found, str) else found(method)


def _of_collapse(method: Method) -> str:
    shared = method.distribution in BY_SHAPE if isinstance(method.distribution, str) else False
    more = "a lower sparsity" if shared else "distribution='erdos_renyi_kernel', a lower sparsity"
    return f"Most outputs of such a layer are constant. Give it more weights ({more}), or leave it dense with exclude=."


def _of_faded_signals(method: Method) -> str:
    learns = "A network that starts so may not learn."
    missing = "norms between the layers, or larger initial weights"
    rescale = getattr(method, "rescale", None)
    if rescale is not None:
        return f"{learns} rescale={rescale!r} has given back what masks take, and more is missing: give {missing}."
    return (
        f"{learns} Give rescale='fan_in', which gives back what masks take of it; what is missing then was missing before: "
        f"{missing}."
    )


def _of_short_run(method: Method) -> str:
    ramp = getattr(method, "ramp", None)
    name, how, example, value = ("stop", "an earlier", 0.75, getattr(method, "stop", None))
    if ramp is not None:
        name, how, example, value = ("ramp", "a shorter", 0.5, ramp)
    best = "" if isinstance(value, float) else f", best as a share of the run, such as {name}={example}"
    return f"Train longer, or give {how} {name}={best}."


def _of_slow_optimizer(method: Method) -> str:
    groups = [group for optimizer in method.owners.optimizers for group in optimizer.param_groups]
    where = "all of its groups" if any(group.get("fused") for group in groups) else "it"
    return f"Give {where} fused=True: it goes through the memory once, and takes the same steps in half of the time or less."


REMEDIES: Mapping[str, str | Callable[[Method], str]] = {
    "collapse": _of_collapse,
    "no_path": (
        "Nothing that goes in changes what comes out. Give a lower sparsity, another distribution= or pattern=, or leave the "
        "narrowest layers dense with exclude=."
    ),
    "faded_signals": _of_faded_signals,
    "short_interval": (
        "Grown weights start at zero and are the smallest until they have learnt, so the same part of the mask changes over "
        "and over. Give a longer every= or a smaller drop_fraction=."
    ),
    "stuck_masks": (
        "Either drop_fraction= of a layer's active weights is less than one, or what is dropped grows straight back: give a "
        "larger drop_fraction=, or Static, which holds one mask for less."
    ),
    "zero_rate": (
        "Weights that grow there stay at zero and are dropped again. Give an earlier stop=, or a learning rate schedule that "
        "ends later."
    ),
    "gradient_noise": (
        "Give larger batches, or accumulate more of them in a step; or take SNFS, which averages gradients over steps, or SET, "
        "which grows at random and needs none."
    ),
    "short_run": _of_short_run,
    "slow_optimizer": _of_slow_optimizer,
}
"""What to do about each warning, by the name of its check: a text, or a function of the method where it depends on that."""
