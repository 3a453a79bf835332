"""The methods of conf/method/*.yaml under the contract, for the suite and for tests over every method."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from sparse_callbacks import SparsityCallback
from sparse_callbacks.core.score_rules import SCORES
from sparse_callbacks.testing import Settings, contract
from sparse_callbacks.testing.library import LIBRARY

_FOUND = {path.stem: OmegaConf.load(path) for path in sorted(Path(__file__).parents[2].glob("conf/method/*.yaml"))}
CONFIGS: dict[str, dict[str, Any]] = {
    name: OmegaConf.to_container(config) for name, config in _FOUND.items() if "_target_" in config
}
# under the contract alone: a method around another one has that one's rules, and has tests of its own; other scores of the loss
# are computed at the same places as SNIP's
_LIKE_OTHERS = ("sup_tickets", "crop", "grasp")
METHODS = [name for name in CONFIGS if name not in _LIKE_OTHERS]


# SynFlow looks at no data, and a hundred rounds in every case would take long
_BY_YAML: dict[str, dict[str, Any]] = {"synflow": {"batches": 1, "loss": None, "rounds": 3}}


def _settings(yaml: str, config: dict[str, Any]) -> Settings:
    name = config["_target_"].rpartition(".")[2]
    if name not in LIBRARY:
        raise LookupError(f"conf/method has {name}, and sparse_callbacks/testing/library.py has no settings for it.")
    defaults = {key: value for key, value in config.items() if key not in ("_target_", "defaults")}
    return replace(LIBRARY[name], arguments=defaults | dict(LIBRARY[name].arguments) | _BY_YAML.get(yaml, {}))


CONTRACTS: dict[str, Any] = {
    name: contract(get_class(config["_target_"]), _settings(name, config)) for name, config in CONFIGS.items()
}


def method(name: str, **changes: Any) -> SparsityCallback:
    """The callback of ``conf/method/<name>.yaml`` for a short run; ``changes`` that this method does not take are left
    out."""
    return CONTRACTS[name]().method(**changes)


def same_batches(name: str, batches: Iterable[Any]) -> dict[str, Any]:
    """Arguments with which a method computes its scores on these batches, of however many processes; none for others."""
    reads = (
        CONFIGS[name]["_target_"].endswith((".PruneAtStart", ".EarlyCroP")) and SCORES[CONFIGS[name]["score"]].of_loss
    )
    return {"batches": list(batches)} if reads else {}


def promises(name: str, promise: str) -> bool:
    """Whether the method makes the promise."""
    return CONTRACTS[name]().promises(promise)


def moves(name: str) -> bool:
    """The method has several updates in a short run."""
    return CONTRACTS[name]().moves()


def moves_at_all(name: str) -> bool:
    """Masks move in a short run, be it once."""
    return CONTRACTS[name]().moves_at_all()


STEADY = [name for name in METHODS if promises(name, "one network")]
every_method = pytest.mark.parametrize("name", METHODS)
every_steady_method = pytest.mark.parametrize("name", STEADY)
