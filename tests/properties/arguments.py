"""Random valid arguments of every method, drawn from its signature."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from support.methods import CONTRACTS

from sparse_callbacks.core.constructors import argument_names
from sparse_callbacks.core.method import Options

# arguments that no example draws, each with the reason
NOT_DRAWN = {
    "forward": "the batches of the examples need no function of their own",
    "statistics_dataloader": "the training data is used",
    "loss": "the batches of the examples need no function of their own",
    "batches": "of criteria that take passes over the data, which have tests of their own",
    "print_plan": "a thousand plans on the terminal help nobody",
    "fresh_start": "its tests are those of resume",
    "epochs": "drawn with the phases",
    "partitions": "drawn with the phases",
    "rounds": "drawn with the phases",
    "score": "each has a file of its own",
    "reinit_after": "some layers of the examples cannot be made anew",
    "start": "drawn with the times",
    "stop": "drawn with the times",
    "finetune": "drawn with the times",
    "when": "the time of one pruning, which has tests of its own",
    "lr_after": "new optimizers after one pruning, which have tests of their own",
    "mode": "drawn with monitor",
    "patience": "drawn with monitor",
    "projection": "the soft one takes fewer arguments, and has a contract of its own",
}


@dataclass(frozen=True)
class Wanted:
    """What arguments may depend on."""

    steps: int
    sparse: tuple[str, ...]
    """Names of the weights that become sparse unless arguments say otherwise."""
    embedding: bool = False
    """There is one, which becomes sparse where include= names it."""


Draw = Callable[[Wanted], st.SearchStrategy[Any]]


def _globs(names: tuple[str, ...], most: int) -> st.SearchStrategy[Any]:
    """From one glob to ``most``, each for one of ``names``."""
    listed = st.lists(st.sampled_from([f"*{n}" for n in names]), min_size=1, max_size=max(1, most), unique=True)
    return st.nothing() if most < 1 else listed


def _include(wanted: Wanted) -> st.SearchStrategy[Any]:
    some = _globs(wanted.sparse, len(wanted.sparse))
    with_embedding = some.map(lambda globs: ["*embedding.weight", *globs])
    return st.one_of(st.just("*"), some, *[with_embedding] * wanted.embedding)


def _mapping(wanted: Wanted) -> st.SearchStrategy[Any]:
    first = st.sampled_from(
        [f"*{n}*" for n in wanted.sparse]
    )  # with the star after it: a layer may be a part of a weight
    return st.builds(lambda glob, share: {glob: share, "*": "uniform"}, first, st.sampled_from([0.0, 0.3, 0.77]))


_NAMED = st.sampled_from(["uniform", "erdos_renyi", "erdos_renyi_kernel"])
_SHARE = st.sampled_from([0.0, 0.1, 0.37, 0.5, 0.8, 0.9, 0.97])
_FRACTION = st.sampled_from(
    [0.0, 0.2, 0.5, 1.0, "constant(0.3)", "linear(0.5)", "exponential(0.4)", "cosine(0.9, 0.1)"]
)
_DENSITY = st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0])

DRAWN: dict[str, Draw] = {
    "sparsity": lambda w: _SHARE,
    "distribution": lambda w: st.one_of(_NAMED, _mapping(w)),
    "include": _include,
    "exclude": lambda w: _globs(w.sparse, len(w.sparse) - 2),
    "keep_dense": lambda w: st.sampled_from(["first", "last", "both"]) if len(w.sparse) > 3 else st.nothing(),
    "seed": lambda w: st.integers(0, 2**31),
    "drop_fraction": lambda w: _FRACTION,
    "drop": lambda w: st.just("signed"),
    "new_weights": lambda w: st.just("uniform"),
    "neuron_importance": lambda w: st.sampled_from([0.05, 0.2, 0.6]),
    "importance_start": lambda w: st.sampled_from([0, 2, 0.1]),
    "importance_every": lambda w: st.sampled_from([1, 3, 0.2]),
    "smoothing": lambda w: st.sampled_from([0.0, 0.5, 0.99]),
    "unit": lambda w: st.nothing(),  # by method, below
    "variant": lambda w: st.sampled_from(["sim", "pure"]),
    "monitor": lambda w: st.just("val_loss"),
    "data_fraction": lambda w: st.sampled_from([0.3, 1.0]),
    "init": lambda w: st.sampled_from(["random", "magnitude"]),
    "restart": lambda w: st.booleans(),
    "budget": lambda w: st.sampled_from([0.3, 0.6, 0.9]),
    "cost": lambda w: st.sampled_from(["parameters", "flops"]),
    "importance": lambda w: st.sampled_from(["taylor", "magnitude"]),
    "criterion": lambda w: st.sampled_from(["l1", "l2", "random", "taylor_fo"]),
    "ranking": lambda w: st.sampled_from(["knapsack", "global", "layer"]),
    "penalty": lambda w: st.sampled_from([0.0, 1e-3]),
    "round_to": lambda w: st.sampled_from([1, 2]),
    "chunk": lambda w: st.sampled_from([1, 2]),
    "curve": lambda w: st.sampled_from(["exp", "linear", "exp2"]),
    "decay": lambda w: st.sampled_from([0.0, 1e-2]),
    "hysteresis": lambda w: st.sampled_from([0.25, 0.5, 1.0]),
    "norm_scaling": lambda w: st.sampled_from(["kept", "importance"]),
    "prune_stem": lambda w: st.booleans(),
    "density": lambda w: _DENSITY,
    "constraint": lambda w: st.sampled_from(["model", "layer"]),
    "droprate": lambda w: st.sampled_from([0.05, 0.5, 0.9]),
    "gate_lr": lambda w: st.sampled_from([7e-4, 0.3]),
    "dual_lr": lambda w: st.sampled_from([1e-4, 0.3]),
    "gate_optimizer": lambda w: st.sampled_from(["sgd", "adam"]),
    "l2": lambda w: st.just(1e-3),
    "epsilon": lambda w: st.sampled_from([0.3, 1.0]),
    "from_checkpoint": lambda w: st.just({"zeros": 0.6}),  # replaced by the state of a network with as many zeros
    "initial_mask": lambda w: st.sampled_from(["random", "magnitude"]),
    "least": lambda w: st.sampled_from([0, 1]),
    "rescale": lambda w: st.sampled_from(["layer", "fan_in"]),
    "pattern": lambda w: st.sampled_from(["fan_in", "fan_in/2", "fan_in/4"]),
    "ablation": lambda w: st.sampled_from([0.3, 0.95]),
    "ramp": lambda w: st.sampled_from([5, 0.5]),
    "candidates": lambda w: st.sampled_from([0.3, 2.0]),
    "storage": lambda w: st.sampled_from(["masked", "sparse", "grouped", "auto", {"*0*": "sparse", "*": "auto"}]),
    "group": lambda w: st.sampled_from([1, 2, 4]),
    "rows": lambda w: st.sampled_from([8, 64]),
    "every": lambda w: st.nothing(),  # with the times, below
}
# what a method understands differently
_OWN: dict[tuple[str, str], Draw] = {
    ("GMP", "sparsity"): lambda w: st.one_of(_SHARE, st.sampled_from(["linear(0.2, 0.8)", "constant(0.7)"])),
    ("DPF", "sparsity"): lambda w: st.one_of(_SHARE, st.sampled_from(["linear(0.2, 0.8)", "constant(0.7)"])),
    ("DPF", "distribution"): lambda w: st.one_of(st.just("global"), _NAMED, _mapping(w)),
    ("DPF", "unit"): lambda w: st.sampled_from(["weight", "filter"]),
    ("NM", "pattern"): lambda w: st.sampled_from(["1:2", "transposable 1:2"]),
    ("PruneAtStart", "distribution"): lambda w: st.one_of(st.just("global"), _NAMED, _mapping(w)),
    ("ConstrainedL0", "unit"): lambda w: st.sampled_from(["weight", "channel"]),
    ("SMCP", "exclude"): lambda w: st.nothing(),  # small networks then have no channels left
    ("SMCP", "include"): lambda w: st.nothing(),
    ("ChannelPruning", "exclude"): lambda w: st.nothing(),
    ("ChannelPruning", "include"): lambda w: st.nothing(),
}
_TWO_WAYS_TO_SAY_IT = [
    ("epsilon", ("sparsity", "distribution")),
    ("from_checkpoint", ("sparsity", "distribution", "initial_mask", "rescale")),
    ("init", ("initial_mask",)),
    ("pattern", ("storage",)),
    ("neuron_importance", ("pattern", "storage")),
    ("least", ("distribution",)),
]
_NOT_WITH_ABLATION = ("storage", "drop", "neuron_importance")


def names_of(method: str) -> list[str]:
    """Arguments of a method's constructor."""
    return argument_names(CONTRACTS[method].callback_class, Options)


@st.composite
def arguments(draw: st.DrawFn, method: str, wanted: Wanted) -> dict[str, Any]:
    """Arguments of a method: those of its short run in the contract, and over them drawn values for some."""
    known, cls = names_of(method), CONTRACTS[method].callback_class.__name__
    drawable = [n for n in known if n not in NOT_DRAWN and not _of(cls, n)(wanted).is_empty]
    chosen = draw(st.lists(st.sampled_from(drawable), unique=True, max_size=5))
    given = {n: draw(_of(cls, n)(wanted)) for n in sorted(chosen)}
    given = _that_leave_layers(given)
    if "monitor" in given:
        given |= {"variant": "seq", "mode": "min", "patience": 1}
    base = dict(CONTRACTS[method].settings.arguments)
    base = {k: v for k, v in base.items() if k in known} | draw(_times(cls, known, wanted.steps))
    made = {k: v for k, v in (base | given).items() if v is not None}
    for name, others in _TWO_WAYS_TO_SAY_IT:
        made = {k: v for k, v in made.items() if name not in made or k not in others}
    if "ablation" in made:  # of a constant fan-in alone
        made = {k: v for k, v in made.items() if k not in _NOT_WITH_ABLATION} | {"pattern": "fan_in"}
    if made.get("pattern") == "fan_in":
        made.pop("candidates", None)
    if made.get("drop") == "signed":  # the rows of a group have signs of their own
        made = {k: v for k, v in made.items() if k != "pattern" and (k, v) != ("storage", "grouped")}
    return made


def _that_leave_layers(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of which each alone leaves layers to make sparse, without those that together might leave none."""
    choose = [n for n in ("distribution", "include", "exclude", "keep_dense") if n in given]
    if isinstance(given.get("distribution"), str):
        choose.remove("distribution")
    if given.get("include") == "*":
        choose.remove("include")
    return {k: v for k, v in given.items() if k not in choose[1:]}


def _of(cls: str, name: str) -> Draw:
    return _OWN.get((cls, name), DRAWN[name])


@st.composite
def _times(draw: st.DrawFn, cls: str, known: list[str], steps: int) -> dict[str, Any]:
    """Times of updates in steps or in fractions of the run, or those that the method has by itself."""
    if "partitions" in known:
        return draw(_phases(known, steps))
    if not {"every", "stop"} <= set(known):
        return {}
    start, stop = draw(st.sampled_from([0, 0.1, 0.25])), draw(st.sampled_from([0.5, 0.75, 1.0]))
    every, finetune = draw(st.sampled_from([0.07, 0.13, 0.25])), draw(st.sampled_from([None, 0.9, 1.0]))
    times = {"every": every, "start": float(start), "stop": stop}
    if "finetune" in known:
        times["finetune"] = None if finetune is None else max(finetune, stop)
    if draw(st.booleans()):
        return times
    whole = {k: v if v is None else round(v * steps) for k, v in times.items()}
    return whole | {"every": max(1, min(whole["every"], whole["stop"] - whole["start"]))}


@st.composite
def _phases(draw: st.DrawFn, known: list[str], steps: int) -> dict[str, Any]:
    partitions = draw(st.sampled_from([1, 2, "random(2)"]))
    rounds = 1 if partitions == 1 else draw(st.integers(1, 2))
    number = rounds * (partitions if isinstance(partitions, int) else 2)
    found: dict[str, Any] = {"partitions": partitions, "rounds": rounds}
    if "every" not in known:  # whole epochs, of which an example has two
        return found | {"rounds": 1, "partitions": draw(st.integers(1, 2)), "epochs": 1}
    how = draw(st.sampled_from(["steps", "fraction", "finetune", "neither"]))
    found |= {
        "steps": {"every": max(1, int(0.7 * steps / number))},
        "fraction": {"every": 0.7 / number},
        "finetune": {"finetune": 0.8},
        "neither": {},
    }[how]
    return found if "every" in found else found | {"every": None}
