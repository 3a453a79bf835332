"""Schedule-free optimizers: those of a stand-in for the package, and, where it is installed, its own."""

import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.optim import Optimizer


def stand_in() -> Any:
    """A module of the package's name, which is not put among the imported ones."""
    path = Path(__file__).parent / "stand_ins" / "schedulefree.py"
    spec = importlib.util.spec_from_file_location("schedulefree", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STAND_IN = stand_in()


def schedule_free(name: str) -> Any:
    """A function of parameters that makes the optimizer ``stand-in/CLASS`` or ``package/CLASS``."""
    source, _, cls = name.partition("/")

    def make(parameters: Iterable[nn.Parameter], **options: Any) -> Optimizer:
        module = STAND_IN if source == "stand-in" else importlib.import_module("schedulefree")
        made: Optimizer = getattr(module, cls)(parameters, **({"lr": 0.05} | options))
        return made

    return make


EVERY = [
    "stand-in/SGDScheduleFree",
    "stand-in/SGDScheduleFreeReference",
    *(
        pytest.param(f"package/{name}ScheduleFree{kind}", marks=pytest.mark.third_party)
        for name, kind in (("SGD", ""), ("AdamW", ""), ("RAdam", ""), ("SGD", "Reference"), ("AdamW", "Reference"))
    ),
]
"""Names of all supported optimizers, for ``pytest.mark.parametrize``."""
