"""Values of the configuration compared with the arguments of what they are for, before it is called."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sparse_callbacks.core.argument_types import refuse_other_types
from sparse_callbacks.core.similar_names import meant


def group_values(cfg: DictConfig, group: str) -> dict[str, Any]:
    """Plain values of a group by name, without the keys that are for Hydra."""
    found = OmegaConf.to_container(cfg[group], resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items() if not str(key).startswith("_")}


def refuse_unknown_arguments(group: str, called: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that a function or class does not have an argument for.

    Args:
        group: the group of the configuration.
        called: the name of the function or class.
        given: the names in the group; those that begin with an underscore are for Hydra.
        known: the names of the arguments.

    Raises:
        ValueError: a name is not among them.
    """
    known = list(known)
    for name in given:
        if not name.startswith("_") and name not in known:
            raise ValueError(
                f"{group}.{name} is not an argument of {called}.{meant(name, known)} It takes {', '.join(known)}."
            )


def refuse_wrong_arguments(
    group: str, function: Callable[..., Any], given: Mapping[str, Any], supplied: Mapping[str, Any] | None = None
) -> None:
    """Refuse names and types that a function or class does not take.

    Args:
        group: the group of the configuration.
        function: the function or class.
        given: the values of the group by name.
        supplied: values that the program adds, by name.

    Raises:
        ValueError: a name that is not an argument.
        TypeError: a value of another type than the argument is annotated with.
    """
    supplied = supplied or {}
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        refuse_unknown_arguments(group, function.__name__, given, [name for name in parameters if name not in supplied])
    # what Hydra makes first has no value yet
    plain = {name: value for name, value in given.items() if not (isinstance(value, dict) and "_target_" in value)}
    init: Any = function
    first: tuple[Any, ...] = ()
    if inspect.isclass(function):
        init, first = function.__init__, (function.__new__(function),)
    try:
        refuse_other_types(init, first, {**plain, **supplied})
    except TypeError as error:
        # as the command line writes it
        said = f"{group}.{error}".replace("or None.", "or null.").replace("True or False", "true or false")
        whole = re.match(r"\S+=(-?\d+)\.0 .*Give a whole number", said)
        raise TypeError(f"{said} Write {whole[1]}." if whole else said) from None
