"""A subclass written for version 0.1 is refused in words, or every name that it defines still counts."""

import re
from pathlib import Path
from typing import Any

import pytest
from support.nets import Regression
from support.rig import fit_steps

import sparse_callbacks
from sparse_callbacks import SET, GaP, ParallelGaP, RigL, SparsityCallback
from sparse_callbacks.core.hooks import BatchEnd
from sparse_callbacks.core.renamed import READ_BY_USERS_ALONE, RENAMED
from sparse_callbacks.methods.drop_and_grow import DropAndGrow

# Every public name of `SparsityCallback` (and its base, `Engine`) in 0.1, as `dir()` listed it, without those of
# Lightning's Callback: the parameters of a method, or what else it was.
NAMES_OF_THE_BASE = {
    "after_backward": "self, scale=0",
    "after_batch": "self",
    "after_step": "self",
    "anchor": "fact",
    "apply_masks": "self, index=0",
    "arrives_at_stop": "fact",
    "at_target": "property",
    "attach": "self, model",
    "average_gradients": "self, on",
    "batch_start": "self",
    "before_batch": "self",
    "before_optimizer_step": "self, optimizer, tick",
    "before_step": "self",
    "begin": "self, model, entries, targets, optimizers, gradients_read, state",
    "begin_training": "self, epoch",
    "curves": "fact",
    "data_epoch": "self, epoch",
    "data_pass": "self, fraction=0, train=0",
    "data_states": "self",
    "due": "self",
    "end": "self",
    "engine_state": "self",
    "epoch_end": "self, metrics, epoch",
    "epoch_start": "self, epoch",
    "explores": "fact",
    "figures": "self",
    "finite": "property",
    "forget": "self",
    "full": "self, names",
    "generator": "self, name, step",
    "gradient": "self, name",
    "horizon": "property",
    "initial_masks": "self",
    "keeps_dense": "fact",
    "load_data_states": "self, states",
    "make_calendar": "self, total, epoch, lenient",
    "mask_gradients": "self",
    "masks": "property",
    "may_be_due": "self",
    "measured_sparsity": "self",
    "move_masks": "self, **events",
    "names": "property",
    "new_masks": "self",
    "new_weights": "self, name",
    "note": "self, **figures",
    "outcome": "self",
    "own_state": "self, state",
    "parameter_zeros": "self, entries, targets",
    "params": "property",
    "plan": "self, model=0",
    "planned_zeros": "self, layer, size",
    "plans_counts": "fact",
    "published_every": "fact",
    "reads_dense_gradients": "fact",
    "rebind": "self, optimizers, gradients_read",
    "rehearse": "self",
    "release": "self",
    "rising": "fact",
    "sanity_end": "self, metrics",
    "schedulable": "fact",
    "set_times": "self, every, start, stop",
    "share_out": "self, entries",
    "shortest_life": "property",
    "shortfall": "self",
    "skip_step": "self",
    "step": "property",
    "steps_are_announced": "fact",
    "takes_turns": "fact",
    "target_sparsity": "property",
    "times": "property",
    "update": "self",
    "validation_end": "self, metrics, epoch",
    "wants_dense_gradients": "self",
    "withhold": "self, optimizer",
    "workers": "property",
}
# those that a method had besides
NAMES_OF_METHODS: dict[str, dict[str, str]] = {
    "DropAndGrow": {"fraction": "property", "grow_scores": "self, name"},
    "RigL": {"fraction": "property", "grow_scores": "self, name"},
    "SET": {"fraction": "property", "grow_scores": "self, name"},
    "SNFS": {"fraction": "property", "grow_scores": "self, name"},
    "CTRE": {"at_random": "property", "fraction": "property", "grow_scores": "self, name"},
    "Static": {},
    "GMP": {"sparsity_at": "self, step"},
    "DPF": {"sparsity_at": "self, step"},
    "ConstrainedL0": {"noise": "self, kernel"},
    "SMCP": {"scores": "self", "share_at": "self, step"},
    "GaP": {
        "begin_optimizer_life": "self",
        "blocks": "self, sizes=0",
        "dense_partition": "property",
        "optimizer_life": "self, total, epoch, lenient",
        "phase_at": "self, step",
        "phases": "property",
        "pruned": "self, names",
    },
    "ParallelGaP": {
        "begin_optimizer_life": "self",
        "blocks": "self, sizes=0",
        "dense_partition": "property",
        "optimizer_life": "self, total, epoch, lenient",
        "phase": "property",
        "phase_at": "self, step",
        "phases": "property",
        "pruned": "self, names",
        "together": "property",
    },
}
CLASSES: dict[str, Any] = {"SparsityCallback": SparsityCallback, "DropAndGrow": DropAndGrow} | {
    name: getattr(sparse_callbacks, name) for name in NAMES_OF_METHODS if name != "DropAndGrow"
}
# names that still mean what they did, so that an override of 0.1 counts
KEPT = {
    "arrives_at_stop",
    "at_random",
    "at_target",
    "attach",
    "begin_optimizer_life",
    "begin_training",
    "blocks",
    "dense_partition",
    "epoch_end",
    "epoch_start",
    "explores",
    "figures",
    "generator",
    "initial_masks",
    "keeps_dense",
    "masks",
    "measured_sparsity",
    "noise",
    "outcome",
    "parameter_zeros",
    "params",
    "phase",
    "phase_at",
    "phases",
    "plan",
    "planned_zeros",
    "plans_counts",
    "pruned",
    "published_every",
    "reads_dense_gradients",
    "rehearse",
    "schedulable",
    "scores",
    "set_times",
    "share_at",
    "share_out",
    "shortfall",
    "sparsity_at",
    "step",
    "target_sparsity",
    "times",
    "together",
    "validation_end",
}
KEPT_BY_SOME = {"GaP": {"horizon", "shortest_life"}}
KEPT_BY_SOME["ParallelGaP"] = KEPT_BY_SOME["GaP"] | {"workers", "data_epoch", "own_state"}

CASES = [
    (base, name, kind)
    for base in CLASSES
    for name, kind in (NAMES_OF_THE_BASE | NAMES_OF_METHODS.get(base, {})).items()
]


def written_for_0_1(kind: str) -> Any:
    """What a subclass of 0.1 would have in its body under a name of this kind."""
    if kind == "property":
        return property(lambda self: None)
    return 1 if kind == "fact" else eval(f"lambda {kind}: None")


@pytest.mark.parametrize(("base", "name", "kind"), CASES)
def test_an_override_of_0_1_is_refused_or_counts(base: str, name: str, kind: str) -> None:
    parent, members = CLASSES[base], {name: written_for_0_1(kind)}
    if name in KEPT | KEPT_BY_SOME.get(base, set()):
        assert hasattr(parent, name)
        assert issubclass(type("Old", (parent,), members), parent)
        return
    with pytest.raises(TypeError, match=rf"^Old\.{name}\b.*The table of old and new names is in CHANGELOG\.md\.$"):
        type("Old", (parent,), members)


def test_a_name_that_counts_is_read_by_the_package() -> None:
    package = Path(sparse_callbacks.__file__).parent
    source = "\n".join(p.read_text() for p in package.rglob("*.py"))
    unread = [name for name in KEPT | KEPT_BY_SOME["ParallelGaP"] if not re.search(rf"\.{name}\b", source)]
    assert unread == []


@pytest.mark.parametrize("base", CLASSES)
def test_the_classes_of_this_package_are_not_refused_and_hold_no_name_that_went(base: str) -> None:
    held = {name for name in RENAMED if hasattr(CLASSES[base], name)}
    lives = {"horizon", "shortest_life", "optimizer_life", "begin_optimizer_life"}
    turns = {"workers", "data_epoch", "own_state"}
    assert held == {"GaP": lives, "ParallelGaP": lives | turns}.get(base, set())
    assert READ_BY_USERS_ALONE.keys() <= {name for names in NAMES_OF_METHODS.values() for name in names}


@pytest.mark.parametrize("name", sorted(RENAMED.keys() | READ_BY_USERS_ALONE.keys()))
def test_the_changelog_has_every_old_name(name: str) -> None:
    table = (Path(sparse_callbacks.__file__).parents[1] / "CHANGELOG.md").read_text()
    assert re.search(rf"`(self\.)?{name}\b[^`]*`", table), f"{name} is in no table"


def test_hooks_of_one_method_count_like_those_of_all() -> None:
    with pytest.raises(TypeError, match=r"grow_scores\(self, name\).*the step is its first argument"):
        type("Old", (RigL,), {"grow_scores": lambda self, name: None})
    with pytest.raises(TypeError, match=r"optimizer_life\(self, total, epoch, lenient\).*run\.total\(\)"):
        type("Old", (GaP,), {"optimizer_life": lambda self, total, epoch, lenient: None})
    with pytest.raises(TypeError, match=r"data_epoch\(self\).*see the hook's docstring"):
        type("Old", (ParallelGaP,), {"data_epoch": lambda self: 0})


@pytest.mark.parametrize("hook", ["begin_training", "batch_end"])
def test_a_hook_of_figures_may_give_nothing(hook: str, tmp_path: Path) -> None:
    calls: list[BatchEnd | int] = []
    silent = type("Silent", (SET,), {hook: lambda self, argument: calls.append(argument)})
    fit_steps(tmp_path, silent(0.5, every=2, stop=4, print_plan=False), Regression(), 4)
    assert len(calls) == {"begin_training": 1, "batch_end": 4}[hook]
