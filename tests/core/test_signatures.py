"""Overrides of old hooks are refused when the class is made; overrides that the engine can call are accepted."""

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparse_callbacks.core.method import Method


def hook(*names: str) -> Callable[..., None]:
    """A function with these positional parameters."""
    made: Callable[..., None] = eval(f"lambda {', '.join(names)}: None")
    return made


@pytest.mark.parametrize(
    ("name", "parameters", "new"),
    [
        ("before_step", ["self"], "step.mask_gradients()"),
        ("after_step", ["self"], "returns self.new_masks(step)"),
        ("new_masks", ["self"], "returns Update(masks)"),
        ("make_calendar", ["self", "total", "epoch", "lenient"], "run.total(), run.epoch() and run.lenient"),
        ("update", ["self"], "new_masks(self, step), which returns an Update"),
        ("before_batch", ["self", "batch"], "window_start(self, batch)"),
        ("after_batch", ["self"], "batch_end(self, end)"),
        ("begin", ["self", "model"], "attach(self, model)"),
        ("apply_masks", ["self"], "write(self, names, finite)"),
        ("move_masks", ["self"], "new_masks(self, step), whose masks the engine takes"),
        ("batch_start", ["self"], "see the hook's docstring"),
    ],
)  # fmt: skip
def test_an_old_hook_is_refused_with_its_new_form(name: str, parameters: list[str], new: str) -> None:
    with pytest.raises(TypeError, match=rf"^Old\.{name}\b.*{re.escape(new)}.*CHANGELOG\.md\.$"):
        type("Old", (Method,), {name: hook(*parameters)})


@pytest.mark.parametrize(("fact", "new"), [("anchor", "first_update"), ("curves", "figure_prefix")])
def test_an_old_fact_is_refused_with_its_new_name(fact: str, new: str) -> None:
    with pytest.raises(TypeError, match=rf"^Old\.{fact} .*Write {new}\..*CHANGELOG\.md\.$"):
        type("Old", (Method,), {fact: 1})


def test_a_grandchild_is_checked_too() -> None:
    child = type("Child", (Method,), {})
    with pytest.raises(TypeError, match=r"^Grandchild\.after_step\(self\)"):
        type("Grandchild", (child,), {"after_step": hook("self")})


@pytest.mark.parametrize(
    "members",
    [
        {"before_step": hook("self", "step"), "after_step": hook("self", "step"), "make_calendar": hook("self", "run")},
        {"before_step": hook("self", "s"), "new_masks": hook("self", "step", "share=0.5")},
        {"write": hook("self", "*args"), "new_weights": hook("*args", "**options")},
        {"own_helper": hook("self", "a", "b", "c"), "first_update": 0, "figure_prefix": "mine"},
        {"__init__": hook("self"), "__repr__": hook("self")},
        {"before_step": staticmethod(hook("step")), "after_step": classmethod(hook("cls", "step"))},
        {
            "before_step": functools.partialmethod(hook("self", "a", "step"), 1),
            "figures": functools.cache(hook("self")),
        },
        {"after_step": torch.no_grad()(hook("self", "step")), "write": print, "attach": hook},
        {"__annotations__": {"own": "int", "seed": "int"}, "fraction": property(hook("self"))},
    ],
)
def test_what_the_engine_can_call_is_accepted(members: dict[str, Any]) -> None:
    assert issubclass(type("New", (Method,), members), Method)


@pytest.mark.parametrize(
    "made",
    [
        staticmethod(hook()),
        classmethod(hook("cls")),
        functools.partialmethod(hook("self", "a"), 1),
        functools.cache(hook("self")),
        torch.no_grad()(hook("self")),
    ],
    ids=["staticmethod", "classmethod", "partialmethod", "cache", "no_grad"],
)
def test_a_wrapped_override_is_seen_through(made: Any) -> None:
    with pytest.raises(TypeError, match=r"^Old\.after_step\(.*returns self\.new_masks\(step\)"):
        type("Old", (Method,), {"after_step": made})


@pytest.mark.parametrize(
    "made", [property(hook("self")), staticmethod(hook()), functools.partialmethod(hook("self", "a"), 1), None, 3]
)
def test_an_old_name_is_refused_whatever_stands_under_it(made: Any) -> None:
    with pytest.raises(TypeError, match=r"^Old\.after_batch .*Write batch_end\(self, end\)\."):
        type("Old", (Method,), {"after_batch": made})


def test_an_old_fact_is_refused_where_it_is_only_annotated() -> None:
    with pytest.raises(TypeError, match=r"^Old\.anchor .*Write first_update\."):
        type("Old", (Method,), {"__annotations__": {"anchor": "int"}})


@pytest.mark.parametrize(
    ("name", "message"), [("before_step", r"\(self\) does not take"), ("after_batch", " is a name")]
)
def test_a_mixin_is_checked_too(name: str, message: str) -> None:
    mixin = type("Mixin", (), {name: hook("self")})
    with pytest.raises(TypeError, match=rf"^Mixin\.{name}{message}"):
        type("Old", (mixin, Method), {})


def test_a_definition_that_another_one_hides_is_not_compared() -> None:
    """A mixin that comes after the method, or whose hook the class overrides itself, is never called."""
    mixin = type("Mixin", (), {"before_step": hook("self")})
    assert issubclass(type("New", (Method, mixin), {}), Method)
    assert issubclass(type("New", (mixin, Method), {"before_step": hook("self", "step")}), Method)
