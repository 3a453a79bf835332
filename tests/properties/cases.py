"""Random runs: a network, a method, an optimizer, a precision and a host."""

import math
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from support.methods import METHODS, promises

from properties.arguments import Wanted, arguments
from properties.networks import Network, networks
from sparse_callbacks.core.selection import select

EPOCHS = 2
OPTIMIZERS = {
    "SGD": {"lr": 0.05},
    "SGD with momentum": {"lr": 0.05, "momentum": 0.9},
    "SGD with nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "Adam": {"lr": 1e-2},
    "Adam with amsgrad": {"lr": 1e-2, "amsgrad": True},
    "AdamW": {"lr": 1e-2},
    "AdamW with amsgrad": {"lr": 1e-2, "amsgrad": True},
    "RMSprop": {"lr": 1e-3},
    "RMSprop centered": {"lr": 1e-3, "momentum": 0.9, "centered": True},
    "Adagrad": {"lr": 1e-2},
    "Adagrad with a start": {"lr": 1e-2, "initial_accumulator_value": 0.3},
    "NAdam": {"lr": 1e-2},
    "RAdam": {"lr": 1e-2},
    "Adamax": {"lr": 1e-2},
    "Adadelta": {},
    "Rprop": {"lr": 1e-3},
    "ASGD": {"lr": 1e-2},
    "Adafactor": {"lr": 1e-2},
    "LBFGS": {"lr": 1e-2},
}
_NO_DECAY = ("Rprop", "LBFGS")
_FUSED = ("SGD", "Adam", "AdamW", "Adagrad")
PRECISIONS = ("32-true", "32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed")


@dataclass(frozen=True)
class Optimizer:
    """``name`` is a key of :data:`OPTIMIZERS`; ``how`` is foreach, fused, a plain loop or torch's own choice; with
    ``two`` there are two, each for half of the layers; with ``groups`` biases and norms have a group of their own."""

    name: str
    decay: float = 0.0
    how: str = ""
    two: bool = False
    groups: bool = False


@dataclass(frozen=True)
class Case:
    """One run, which :func:`properties.runs.run` trains.

    ``host`` is trainer or loop; ``window`` the micro-batches of a step; ``clip`` norm, value or empty; ``manual`` manual
    optimization; ``schedule`` a learning rate that falls; ``inf_at`` micro-batches whose loss is infinite (under a
    GradScaler); ``twist`` what is done besides: ``again`` trains a second time and compares, a number of micro-batches
    resumes from a checkpoint written after so many.
    """

    network: Network
    method: str
    arguments: dict[str, Any] = field(default_factory=dict)
    optimizer: Optimizer = Optimizer("SGD with momentum")
    host: str = "trainer"
    precision: str = "32-true"
    batches: int = 8
    window: int = 1
    clip: str = ""
    manual: bool = False
    schedule: bool = False
    inf_at: tuple[int, ...] = ()
    twist: str | int = ""

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return EPOCHS * math.ceil(self.batches / self.window)

    @property
    def epoch_steps(self) -> int:
        return math.ceil(self.batches / self.window)


def wanted_of(network: Network, steps: int) -> Wanted:
    """What the arguments of a run may depend on."""
    sparse = tuple(e.name for e in select(network.build()) if not e.reason)
    return Wanted(steps, sparse, network.space == "tokens" and "tied embedding" not in network.traits)


def _ways(optimizer: str, may_fuse: bool) -> list[str]:
    """How an optimizer may loop over its parameters."""
    if optimizer == "LBFGS":
        return [""]
    return ["", "loop", "foreach"] + ["fused"] * (may_fuse and optimizer.split(" ")[0] in _FUSED)


_UNDER_A_BUDGET = ("smcp", "channels")


@st.composite
def cases(draw: st.DrawFn, method: str | None = None) -> Case:
    """Runs of a method, by default of any."""
    name = draw(st.sampled_from(METHODS)) if method is None else method
    network = draw(networks(convolutions_only=name in _UNDER_A_BUDGET, simple=not promises(name, "any layer")))
    name_of_optimizer = draw(st.sampled_from(list(OPTIMIZERS)))
    # ParallelGaP needs a Trainer
    host = draw(st.sampled_from(["trainer", "loop"])) if promises(name, "one network") else "trainer"
    manual = host == "trainer" and promises(name, "one network") and draw(st.booleans())
    precision, clip = draw(st.sampled_from(PRECISIONS)), draw(st.sampled_from(["", "", "norm", "value"]))
    # in mixed precision Lightning clips no fused optimizer, and of the GradScaler of a loop nobody knows before its step
    may_fuse = not precision.endswith("mixed") or (host == "trainer" and not clip)
    optimizer = Optimizer(
        name_of_optimizer,
        0.0 if name_of_optimizer in _NO_DECAY else draw(st.sampled_from([0.0, 0.0, 1e-2])),
        draw(st.sampled_from(_ways(name_of_optimizer, may_fuse))),
        two=(manual or host == "loop") and name not in _UNDER_A_BUDGET and draw(st.booleans()),
        groups=name_of_optimizer != "LBFGS" and draw(st.booleans()),
    )
    case = Case(
        network,
        name,
        {},
        optimizer,
        host,
        precision,
        batches=draw(st.integers(6, 8)),
        window=draw(st.sampled_from([1, 1, 2, 3])),
        clip=clip,
        manual=manual,
        schedule=host == "trainer" and draw(st.booleans()),
        inf_at=tuple(draw(st.lists(st.integers(0, 9), max_size=2, unique=True))) if precision == "16-mixed" else (),
    )
    wanted = wanted_of(network, case.steps)
    twist = draw(st.sampled_from(["", "", "again", "resume"]))
    if twist == "resume":
        twist = draw(st.integers(1, case.batches - 1)) + draw(st.sampled_from([0, case.batches]))
    return Case(**{**vars(case), "arguments": draw(arguments(name, wanted)), "twist": twist})
