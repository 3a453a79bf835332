"""Docstrings of public names are complete: each argument, each error, an example that runs, and sections that parse.

Public is what `__all__` of these modules names, and of its classes the methods and properties without an underscore. What
tests/test_house_rules.py asks of every file is not repeated here.
"""

import ast
import dataclasses
import doctest
import functools
import inspect
import logging
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sparse_callbacks
from sparse_callbacks import channels, methods, testing
from sparse_callbacks.core import distributions, ops, schedules
from sparse_callbacks.core.constructors import argument_names
from sparse_callbacks.core.method import Method, Options

ROOT = Path(__file__).parents[1]
MODULES = (sparse_callbacks, methods, channels, testing, ops, schedules, distributions)
# what a user meets and does not make, or derives from
NOT_MADE = {
    "Method",
    "Options",
    "SparsityCallback",
    "DropAndGrow",
    "Step",
    "SparseRun",
    "Plan",
    "Update",
    "DoctorWarning",
}
LONGEST = 120  # characters of a first sentence, which is one line
OWNERS: dict[str, type] = {}
"""The class of each public method and property, by its name."""
METHOD_CLASSES = [getattr(methods, name) for name in methods.__all__]


def is_ours(found: Any) -> bool:
    return (getattr(found, "__module__", None) or "").startswith("sparse_callbacks")


def members_of(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class itself defines, unwrapped."""
    for name, found in vars(cls).items():
        if not name.startswith("_"):
            found = getattr(found, "__func__", getattr(found, "fget", getattr(found, "func", found)))
            if inspect.isfunction(found) and is_ours(found):
                yield name, inspect.unwrap(found)


@functools.cache
def public() -> dict[str, Any]:
    """Every public class, function, method and property by its name, each once."""
    found: dict[str, Any] = {}
    for module in MODULES:
        for name in module.__all__:
            named = getattr(module, name)
            # a callback is its method, with the same docstring
            named = getattr(methods, name, named) if module is sparse_callbacks else named
            if (inspect.isclass(named) or inspect.isfunction(named)) and is_ours(named):
                found.setdefault(f"{named.__module__}.{named.__qualname__}", named)
    for named in list(found.values()):
        for cls in [c for c in named.__mro__ if is_ours(c)] if inspect.isclass(named) else []:
            for name, member in members_of(cls):
                full = f"{cls.__module__}.{cls.__qualname__}.{name}"
                found.setdefault(full, member)
                OWNERS[full] = cls
    return found


def functions() -> dict[str, Any]:
    """Public functions and methods that explain themselves; others are explained by what they override, or refer to it."""
    found = {name: f for name, f in public().items() if inspect.isfunction(f) and f.__doc__}
    return {n: f for n, f in found.items() if "Args:" in str(f.__doc__) or not (overrides(n) or refers(f))}


def refers(found: Any) -> bool:
    """Whether a docstring is a reference to another one."""
    return str(found.__doc__).startswith("See ")


def overrides(name: str) -> bool:
    """Whether a base class has a method of that name, with a docstring."""
    bases = OWNERS[name].__mro__[1:] if name in OWNERS else ()
    return any(getattr(vars(base).get(name.rpartition(".")[2]), "__doc__", None) for base in bases)


def classes() -> dict[str, type]:
    return {name: found for name, found in public().items() if inspect.isclass(found)}


def section(doc: str | None, *titles: str) -> dict[str, str]:
    """The entries of a section of a docstring: what they are of, and what they say."""
    found: dict[str, str] = {}
    inside, last = False, ""
    for line in inspect.cleandoc(doc or "").splitlines():
        if re.fullmatch(r"[A-Z]\w+:", line):
            inside = line[:-1] in titles
        elif line and not line.startswith(" "):
            inside = False
        elif inside and (entry := re.match(r" {4}([\w*][^:]*): +(\S.*)", line)):
            last = entry[1]
            found[last] = entry[2]
        elif inside and last:
            found[last] += line
    return found


def parameters_of(function: Any) -> list[str]:
    """Names of parameters, with stars, without self."""
    return [
        "*" * (2 if p.kind is p.VAR_KEYWORD else p.kind is p.VAR_POSITIONAL) + name
        for name, p in inspect.signature(function).parameters.items()
        if name not in ("self", "cls")
    ]


def constructor_of(cls: type) -> Any | None:
    """The constructor that a class of ours has itself."""
    init = vars(cls).get("__init__")
    return inspect.unwrap(init) if init is not None and is_ours(init) else None


# ---------------------------------------------------------------------- what is there


def test_the_public_names_are_found() -> None:
    assert len(classes()) > 30
    assert len(functions()) > 120
    assert [name for name, found in public().items() if not found.__doc__ and not overrides(name)] == []


def test_every_parameter_is_documented_by_itself_and_no_other_is() -> None:
    faults: list[str] = []
    for name, function in functions().items():
        faults += _differences(name, parameters_of(function), section(function.__doc__, "Args"))
    for name, cls in classes().items():
        init = constructor_of(cls)
        documented = section(cls.__doc__, "Args") | section(getattr(init, "__doc__", None), "Args")
        if dataclasses.is_dataclass(cls):
            fields = [field.name for field in dataclasses.fields(cls) if not field.name.startswith("_")]
            faults += _differences(name, fields, documented | section(cls.__doc__, "Attributes"))
        elif init is not None and cls.__name__ != "SparseRun":  # which sparsify() makes
            faults += _differences(name, parameters_of(init), documented)
        elif issubclass(cls, Method):
            faults += [f"{name}: {n} is not an argument" for n in documented if n not in argument_names(cls, Options)]
    assert not faults, "\n".join(faults)


def _differences(name: str, parameters: list[str], documented: dict[str, str]) -> Iterator[str]:
    yield from (f"{name}: {p} is not documented" for p in parameters if p not in documented)
    yield from (f"{name}: {d} is not a parameter" for d in documented if d not in parameters)


def raised_in(function: Any) -> set[str]:
    """Classes of the errors that a function raises itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    found, waiting = set(), [*ast.iter_child_nodes(tree)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found.add(ast.unparse(node.exc.func).rpartition(".")[2])
        waiting += ast.iter_child_nodes(node)
    return found - {"NotImplementedError"}


def test_every_error_that_a_function_raises_itself_is_documented() -> None:
    faults = []
    raising = {name: (found, found.__doc__) for name, found in functions().items()}
    for name, cls in classes().items():
        init = None if dataclasses.is_dataclass(cls) else constructor_of(cls)
        for made in (init, vars(cls).get("__post_init__")):
            if made is not None:
                raising[f"{name}.{made.__name__}"] = made, f"{cls.__doc__}\n{made.__doc__}"
    for name, (function, doc) in raising.items():
        said = ", ".join(re.findall(r"^ +([\w, ]+): ", (doc or "").partition("Raises:")[2], re.MULTILINE))
        faults += [f"{name}: {error} is not documented" for error in raised_in(function) if error not in said]
    assert not faults, "\n".join(faults)


def test_every_method_has_a_card() -> None:
    for cls in METHOD_CLASSES:
        doc = inspect.cleandoc(cls.__doc__ or "")
        wanted = ["Args:", "Raises:", ">>> "]
        if cls is not methods.Static:  # the baseline, which nobody has published as a method
            wanted += ["Reference: ", "Differs from "]
        assert [part for part in wanted if part not in doc] == [], cls


@pytest.mark.parametrize("name", [n for n in sparse_callbacks.__all__ if n not in NOT_MADE])
def test_what_users_call_has_an_example_that_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = getattr(sparse_callbacks, name)
    if not inspect.isclass(found) and not inspect.isfunction(found):
        return  # a module, or a type alias
    monkeypatch.chdir(tmp_path)
    _run(found.__doc__, {}, name)


@pytest.mark.parametrize("module", [ops, schedules, distributions], ids=lambda m: m.__name__)
def test_examples_of_small_functions_run(module: Any) -> None:
    for name in module.__all__:
        if inspect.isfunction(function := getattr(module, name)) and ">>> " in (function.__doc__ or ""):
            _run(function.__doc__, dict(inspect.unwrap(function).__globals__), name)


def _run(doc: str | None, names: dict[str, Any], name: str) -> None:
    test = doctest.DocTestParser().get_doctest(doc or "", names, name, None, None)
    assert test.examples, f"{name} has no example"
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert not said, "".join(said)


# ---------------------------------------------------------------------- how it reads


def test_a_docstring_begins_with_a_short_sentence() -> None:
    faults = []
    for name, found in public().items():
        if found.__doc__:
            first = inspect.cleandoc(found.__doc__).partition("\n\n")[0]
            if not first.endswith((".", ":")) or len(first) > LONGEST or "\n" in first:
                faults.append(f"{name}: {first}")
    assert not faults, "\n".join(faults)


def test_the_page_generator_parses_every_docstring(caplog: pytest.LogCaptureFixture) -> None:
    """What mkdocstrings would warn of when it builds the pages."""
    griffe = pytest.importorskip("griffe")
    with caplog.at_level(logging.WARNING):
        package = griffe.load("sparse_callbacks", search_paths=[str(ROOT)], docstring_parser=griffe.Parser.google)
        for name, found in public().items():
            documented = package[name.removeprefix("sparse_callbacks.")].docstring if found.__doc__ else None
            if documented is not None:
                documented.parse()
    assert [record.getMessage() for record in caplog.records] == []
