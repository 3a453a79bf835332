"""Constructor arguments are kept under their own names, whatever the class."""

import inspect
import pickle
import re
from abc import ABC
from typing import Any, Unpack

import pytest

from sparse_callbacks import methods
from sparse_callbacks.core.constructors import argument_names
from sparse_callbacks.core.method import Method, Options
from sparse_callbacks.methods import RigL


class Keeps(Method):
    def __init__(self, sparsity: float = 0.9, *, strength: float = 2.0, **options: Unpack[Options]) -> None:
        super().__init__(sparsity, distribution="uniform", include=None, exclude=None, seed=0, **options)
        self.strength = strength


class Loses(Method):
    def __init__(self, sparsity: float = 0.9, *, strength: float = 2.0, reach: int = 1) -> None:
        super().__init__(sparsity, distribution="uniform", include=None, exclude=None, seed=0)
        self._strength, self._reach = strength, reach


class KeepsAfterAll(Loses):
    def __init__(self, strength: float = 3.0) -> None:
        super().__init__(strength=strength)
        self.strength = strength


class Abstract(RigL, ABC):
    def __init__(self, sparsity: float = 0.9, *, reach: int = 1, **options: Any) -> None:
        super().__init__(sparsity, **options)
        self.reach = reach


def test_a_lost_argument_is_refused_when_the_constructor_returns() -> None:
    with pytest.raises(
        TypeError, match=r"Loses\.__init__ takes strength=, reach= and does not keep it.*self\.reach = reach"
    ):
        Loses()


def test_the_outermost_constructor_decides() -> None:
    assert KeepsAfterAll(4.0).strength == 4.0  # its parent alone loses the argument


def test_an_inherited_constructor_is_checked_too() -> None:
    class Callback(Loses):
        pass

    with pytest.raises(TypeError, match=r"Callback\.__init__ takes strength="):
        Callback()


def test_after_an_error_in_a_constructor_the_next_object_is_checked() -> None:
    with pytest.raises(ValueError, match="sparsity=2"):
        Loses(2.0)
    with pytest.raises(TypeError, match="does not keep it"):
        Loses()


@pytest.mark.parametrize("cls", [Keeps, Abstract, KeepsAfterAll], ids=lambda cls: cls.__name__)
def test_what_is_kept_is_no_trouble(cls: type) -> None:
    made = cls()
    assert list(inspect.signature(cls).parameters) == list(inspect.signature(cls.__init__).parameters)[1:]
    assert inspect.getsource(cls.__init__).lstrip().startswith("def __init__")
    copy = pickle.loads(pickle.dumps(made))
    assert repr(copy) == repr(made)
    assert "_constructors_running" not in vars(made)


@pytest.mark.parametrize("name", [name for name in methods.__all__ if name != "SupTickets"])  # around another one
def test_every_method_keeps_its_arguments(name: str) -> None:
    made = getattr(methods, name)()
    names = argument_names(type(made), Options)
    assert {"keep_dense", "print_plan", "fresh_start", "include", "exclude", "seed"} <= set(names)
    assert all(hasattr(made, argument) for argument in names)


class HandsOn(RigL):
    def __init__(self, *args: Any, extra: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.extra = extra


@pytest.mark.parametrize("argument", [{"initial_mask": "snip"}, {"rescale": "layer"}], ids=lambda a: next(iter(a)))
@pytest.mark.parametrize("name", [name for name in methods.__all__ if name != "SupTickets"])
def test_a_method_takes_first_masks_or_says_who_does(name: str, argument: dict[str, Any]) -> None:
    cls = getattr(methods, name)
    if argument.keys() <= set(argument_names(cls, Options)):
        cls(**argument)
        return
    (told,) = argument
    with pytest.raises(
        ValueError, match=rf"{told}='.*': {name} .*\. Leave {told}= out; Static, SET, RigL, SNFS, CTRE and GaP"
    ):
        cls(**argument)


class OfFirstMasks(methods.GMP):
    def __init__(self, *, initial_mask: str = "random", **options: Any) -> None:
        super().__init__(**options)
        self.initial_mask = initial_mask


def test_a_class_may_have_such_an_argument_of_its_own() -> None:
    assert OfFirstMasks(initial_mask="mine").arguments["initial_mask"] == "'mine'"


class Closed(methods.EarlyCroP):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: methods.EarlyCroP(when="start", reinit_after=True), "reinit_after"),
        (lambda: Closed(when="start", reinit_after=True), "reinit_after"),
        (lambda: methods.PruneAtStart(group=32), "group"),
        (lambda: methods.CTRE(rows=32), "rows"),
        (lambda: methods.ParallelGaP(restart=False), "restart"),
    ],
    ids=["of a parent", "handed on", "of a grandparent", "of storage", "of GaP"],
)
def test_an_argument_that_a_class_does_not_name_is_refused(make: Any, argument: str) -> None:
    with pytest.raises(
        TypeError, match=rf"has no argument {argument}=: .*\. Leave it out; \w+ has sparsity=.*fresh_start=\."
    ):
        make()


class Fixed(methods.RigL):
    def __init__(self, sparsity: float = 0.5) -> None:
        super().__init__(sparsity)


class MakesAnother(methods.RigL):
    def __init__(self, share: float) -> None:
        Fixed(share=share)  # type: ignore[call-arg]
        super().__init__(share)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: methods.RigL(sparsty=0.8),
            "RigL has no argument sparsty=. Did you mean sparsity? RigL has sparsity=,",
        ),
        (lambda: methods.CTRE(0.8, drop=0.1), "CTRE has no argument drop=. Did you mean drop_fraction? CTRE has"),
        (lambda: methods.RigL(0.8, zzz=0.1), "RigL has no argument zzz=. RigL has sparsity=,"),
        (
            lambda: HandsOn(0.8, sed=0.1),
            "HandsOn has no argument sed=. Did you mean seed? HandsOn has extra=, sparsity=,",
        ),
        (lambda: Fixed(seed=3), "Fixed has no argument seed=. Fixed has sparsity=."),
        (lambda: MakesAnother(share=0.9), "Fixed has no argument share=. Fixed has sparsity=."),
        (
            lambda: methods.SupTickets(methods.SET(), sparsity=0.8),
            "SupTickets has no argument sparsity=. It is one of the method in base=, as in SupTickets(SET(sparsity=...)).",
        ),
        (
            lambda: methods.SupTickets(base=methods.SET(), drop="signed"),
            "SupTickets has no argument drop=. It is one of the method in base=, as in SupTickets(SET(drop=...)).",
        ),
        (
            lambda: methods.SupTickets(methods.RigL(), drop="signed"),
            "SupTickets has no argument drop=. Did you mean drop_fraction?",
        ),
        (
            lambda: methods.SupTickets(methods.SET(), keep_dense="first"),
            "It is one of the method in base=, as in SupTickets(SET(keep_dense=...)). SupTickets has base=, share=,",
        ),
    ],
)
def test_an_unknown_argument_is_refused_by_the_class_that_was_called(make: Any, sentence: str) -> None:
    with pytest.raises(TypeError, match=re.escape(sentence)):
        make()


@pytest.mark.parametrize("argument", [{"storage": "masked"}, {"pattern": None}, {"ablation": None}], ids=str)
def test_what_changes_nothing_in_any_method_is_taken(argument: dict[str, Any]) -> None:
    assert methods.PruneAtStart(**argument).target_sparsity == 0.9


def test_arguments_that_are_handed_on_are_known() -> None:
    made = HandsOn(0.8, drop_fraction=0.1)
    assert made.arguments["sparsity"] == "0.8"
    assert made.arguments["drop_fraction"] == "0.1"
    assert set(argument_names(HandsOn, Options)) == {"extra", *argument_names(RigL, Options)}
