"""The methods, found by their yaml in conf/method/, and what each promises."""

from pathlib import Path
from typing import Any

from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from sparse_callbacks import SparsityCallback

_FOUND = {path.stem: OmegaConf.load(path) for path in Path(__file__).parents[2].glob("conf/method/*.yaml")}
CONFIGS: dict[str, dict[str, Any]] = {
    name: OmegaConf.to_container(config) for name, config in sorted(_FOUND.items()) if "_target_" in config
}
METHODS = list(CONFIGS)

# several updates in 16 steps, which move enough weights for some to come straight back
SHORT = {"sparsity": 0.8, "every": 3, "stop": 14, "drop_fraction": 0.5, "partitions": 2, "rounds": 2, "print_plan": False}
STEPS = 16


def method(name: str, **changes: Any) -> SparsityCallback:
    """The callback of ``conf/method/<name>.yaml`` for a short run; ``changes`` that this method does not take are left out."""
    config = CONFIGS[name]
    short = SHORT | ({"rounds": 1} if class_of(name).takes_turns else {})  # its phases are whole epochs, and there are two
    if "budget" in config:  # the networks here have few channels
        short |= {"budget": 0.6, "round_to": 1, "start": 1, "prune_stem": True}
    return instantiate(config | {k: v for k, v in (short | changes).items() if k in config}, _convert_="all")


def class_of(name: str) -> type[SparsityCallback]:
    """The class of the method."""
    return get_class(CONFIGS[name]["_target_"])


# methods that train one network from the first step to the last
STEADY = [name for name in METHODS if not class_of(name).takes_turns]
# of these, methods with as many zeros as planned; in the others gates or a budget decide
MASKED = [name for name in STEADY if class_of(name).plans_counts]


def moves(name: str) -> bool:
    """The method has several updates in a short run: its yaml says how often."""
    return "every" in CONFIGS[name]


def draws_new_weights(name: str) -> bool:
    """Grown weights start from values of their own."""
    return class_of(name).new_weights is not SparsityCallback.new_weights


def looks_at_activations(name: str) -> bool:
    """The method passes over data for the activations of linear layers and convolutions: its yaml says over how much."""
    return "data_fraction" in CONFIGS[name]


def explores(name: str) -> bool:
    """The method grows connections."""
    return class_of(name).explores
