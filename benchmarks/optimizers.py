"""Try every optimizer of a package under RigL, SET and CTRE, and write the outcomes into docs/optimizers.md.

    python benchmarks/optimizers.py                      # all packages that are installed
    python benchmarks/optimizers.py torch bitsandbytes   # these alone; the other sections of the page stay

A small network trains for some updates. An optimizer is right where weights stay finite and sparse, the first step of grown
weights is neither far larger nor far smaller than that of the others, and replaced steps move nothing; refused where
sparsify() or the first step says so in words; and left out where it does not train the same network without us.
"""

import argparse
import importlib
import importlib.metadata
import inspect
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import SparseRun, sparsify
from sparse_callbacks.methods import CTRE, SET, RigL

PAGE = Path(__file__).parents[1] / "docs/optimizers.md"
# the name of a distribution, and the module that exports its optimizers
PACKAGES = {
    "torch": "torch.optim",
    "timm": "timm.optim",
    "bitsandbytes": "bitsandbytes.optim",
    "schedulefree": "schedulefree",
    "lion-pytorch": "lion_pytorch",
    "torchao": "torchao.optim",
    "pytorch-optimizer": "pytorch_optimizer",
}
METHODS: dict[str, Callable[..., Any]] = {"RigL": RigL, "SET": SET, "CTRE": CTRE}
STEPS, EVERY = 28, 5
RIGHT = "right"
# How many times the first step of grown weights may be larger than the others' and than that of the run, in which all weights
# are fresh, and how many times smaller than the others'. Adam's is 3 times as large, that of AdaMod 50 times.
LARGER, SMALLER = 100.0, 1000.0
UNRESOLVED = 1e-6  # smaller steps are lost in the rounding of weights


class LeftOut(Exception):  # noqa: N818  # an outcome and not a fault
    """An optimizer does not train the network without us either, with the reason."""


class Wrong(Exception):  # noqa: N818  # an outcome too
    """Training is silently wrong, with what is."""


# ---------------------------------------------------------------------- the optimizers of a package


def classes(module: str) -> dict[str, type]:
    """Every optimizer class that a module exports, by name."""
    exporting, found = importlib.import_module(module), {}
    for name in sorted(n for n in dir(exporting) if not n.startswith("_")):
        with suppress(Exception):  # a lazy name that needs another package
            made = getattr(exporting, name)
            if inspect.isclass(made) and issubclass(made, torch.optim.Optimizer) and not inspect.isabstract(made):
                found[name] = made
    return {name: made for name, made in found.items() if made is not torch.optim.Optimizer}


def build(kind: Any, net: nn.Sequential) -> torch.optim.Optimizer:
    """An optimizer over ``net``, with a guess at each argument that its constructor asks for.

    Raises:
        LeftOut: no guess fits.
    """
    reasons = []
    for parameters in _parameters(net):
        for more in ({}, {"momentum": 0.9}):
            try:
                made: torch.optim.Optimizer = kind(**_arguments(kind, net, parameters) | more)
            # whatever somebody's constructor raises
            except Exception as error:
                reasons.append(f"{type(error).__name__}: {error}")
            else:
                if hasattr(made, "param_groups"):
                    return made
                reasons.append("has no parameter groups, so it is no optimizer of torch")
    raise LeftOut(f"its constructor: {reasons[0]}")


def _parameters(net: nn.Sequential) -> Iterator[Any]:
    """What optimizers take: all parameters, matrices alone, matrices marked for Muon."""
    matrices, others = [p for p in net.parameters() if p.ndim == 2], [p for p in net.parameters() if p.ndim != 2]
    yield list(net.parameters())
    yield [{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}]
    yield matrices


def _arguments(kind: Any, net: nn.Sequential, parameters: Any) -> dict[str, Any]:
    asked = inspect.signature(kind).parameters.values()
    takes_class = "params" in (a.name for a in asked)
    inner: Any = torch.optim.SGD if takes_class else torch.optim.SGD(parameters, lr=1e-2)
    guesses = {
        "params": parameters,
        "model": net,
        "optimizer": torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
        "base_optimizer": inner,
        "lr": 1e-3,
        "num_data": 64,
        "num_iterations": 100,
    }
    needed = {a.name for a in asked if a.default is a.empty and a.kind not in (a.VAR_KEYWORD, a.VAR_POSITIONAL)}
    rate = {"lr"} if any(a.name == "lr" for a in asked) or (takes_class and "base_optimizer" in needed) else set()
    return {name: guesses[name] for name in needed | rate if name in guesses}


# ---------------------------------------------------------------------- a trial


@dataclass
class Trial:
    """A network, its optimizer, and its data."""

    net: nn.Sequential
    optimizer: torch.optim.Optimizer
    data: DataLoader[Any]

    @classmethod
    def of(cls, kind: Any) -> "Trial":
        torch.manual_seed(0)
        # 4096 weights, from which on some optimizers keep 8 bits; tanh and a last layer that stays dense, so that every
        # weight has a gradient
        net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
        x = torch.randn(16 * STEPS, 16)
        data = DataLoader(TensorDataset(x, (x @ torch.randn(16, 4)).argmax(1)), batch_size=16)
        optimizer = build(kind, net)
        if callable(train := getattr(optimizer, "train", None)):
            train()
        return cls(net, optimizer, data)

    def step(self, batch: Any, closure: bool) -> None:
        """One step of a loop like everybody's."""

        def loss() -> Tensor:
            self.optimizer.zero_grad()
            found = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            found.backward()
            return found

        if closure:
            self.optimizer.step(loss)
        else:
            loss()
            self.optimizer.step()

    def finite(self) -> bool:
        """All weights are."""
        return all(bool(p.isfinite().all()) for p in self.net.parameters())


def needs_closure(kind: Any) -> bool:
    """Whether the optimizer trains the network, without us, with a closure alone.

    Raises:
        LeftOut: it trains it neither with nor without.
    """
    reasons = []
    for closure in (False, True):
        trial = Trial.of(kind)
        try:
            for batch in list(trial.data)[:3]:
                trial.step(batch, closure)
        # whatever somebody's step raises
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
        else:
            if trial.finite():
                return closure
            reasons.append("its weights are NaN or infinite")
    raise LeftOut(f"its step, without us too: {reasons[-1]}")


def outcome(kind: Any, method: str, closure: bool) -> str:
    """What comes of an optimizer under a method: right, or refused with the reason.

    Raises:
        Wrong: neither.
    """
    trial = Trial.of(kind)
    made = METHODS[method](0.8, distribution="uniform", exclude="4.*", every=EVERY, stop=STEPS - 3, print_plan=False)
    try:
        run = sparsify(made, trial.net, trial.optimizer, STEPS, data=trial.data)
    except ValueError as error:
        return f"refused: {_short(str(error))}"
    except Exception as error:
        raise Wrong(f"sparsify() fails: {type(error).__name__}: {error}") from error
    watch = Watch(trial, run)
    for number, batch in enumerate(trial.data):
        watch.before_step()
        try:
            trial.step(batch, closure)
        except ValueError as error:
            if number == 0:
                return f"refused at the first step: {_short(str(error))}"
            raise Wrong(f"step {number} fails: {_short(str(error))}") from error
        # whatever somebody's step raises
        except Exception as error:
            raise Wrong(f"step {number} fails: {type(error).__name__}: {_short(str(error))}") from error
        watch.after_step()
    if not run.updates:
        raise Wrong("no mask has moved")
    return RIGHT


class Watch:
    """Holds each step of a run to what we promise of it."""

    def __init__(self, trial: Trial, run: SparseRun) -> None:
        self._trial, self._run = trial, run
        self._grown: dict[str, Tensor] = {}
        self._first: dict[str, float] = {}

    def before_step(self) -> None:
        """A step comes."""
        self._values = {n: p.detach().clone() for n, p in self._trial.net.named_parameters()}
        self._masks, self._taken = dict(self._run.masks), self._run.step

    def after_step(self) -> None:
        """The step was taken.

        Raises:
            Wrong: what the step did is not what we promise.
        """
        run = self._run
        if not self._trial.finite():
            raise Wrong("weights are NaN or infinite")
        moved = {n: (p.detach() - self._values[n]).abs() for n, p in self._trial.net.named_parameters()}
        kept = {n: run.masks[n] & self._masks[n] for n in run.masks}
        for name, mask in run.masks.items():
            if self._trial.net.get_parameter(name).detach()[~mask].any():
                raise Wrong("pruned weights are not zero")
        if run.step == self._taken:
            if any(m[kept[n]].any() if n in kept else m.any() for n, m in moved.items()):
                raise Wrong("weights move in a replaced step")
        else:
            for name in kept:
                size = float(moved[name][kept[name]].max())
                self._first.setdefault(name, size)  # of weights that are all fresh
                if (grown := self._grown.get(name)) is not None:
                    others = moved[name][kept[name] & ~grown]
                    self._compare(moved[name][grown & kept[name]], others, self._first[name])
            self._grown = {}
        self._grown |= {n: g for n, m in run.masks.items() if (g := m & ~self._masks[n]).any()}

    @staticmethod
    def _compare(grown: Tensor, others: Tensor, first: float) -> None:
        if grown.numel() and others.numel():
            largest = max(float(others.max()), first, UNRESOLVED)
            if grown.max() > LARGER * largest:
                raise Wrong(f"the first step of grown weights is {grown.max() / largest:.0f} times too large")
            if grown.median() <= 2 * UNRESOLVED and grown.median() * SMALLER < others.median() - UNRESOLVED:
                raise Wrong("grown weights do not move")


def _short(text: str) -> str:
    """The reason in an error of ours: without the method's name and without the advice, which are the same in all."""
    text = re.sub(
        r"^.*?(?:fresh weight\. With \w+ that is not possible: |nothing may move\. )", "", " ".join(text.split())
    )
    text = re.sub(r"\.? (Use an(other)? optimizer|Use one of the package|Let it hold an optimizer).*$", "", text)
    return textwrap.shorten(text, 320, placeholder=" ...")


# ---------------------------------------------------------------------- the page


def outcomes(kind: Any) -> dict[str, str]:
    """What comes of an optimizer, by method; one entry without a method where it is left out."""
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        found = {}
        try:
            closure = needs_closure(kind)
        except LeftOut as error:
            return {"": f"left out: {_short(str(error))}"}
        for method in METHODS:
            try:
                found[method] = outcome(kind, method, closure)
            except Wrong as error:
                found[method] = f"wrong: {error}"
        return found


def row(name: str, found: Mapping[str, str]) -> str:
    """The row of an optimizer: methods of one outcome together."""
    by_outcome: dict[str, list[str]] = {}
    for method, text in found.items():
        by_outcome.setdefault(text.replace("|", "\\|").replace("`", "'"), []).append(method)
    told = "; ".join(text if len(by_outcome) == 1 else f"{', '.join(m)}: {text}" for text, m in by_outcome.items())
    return f"| `{name}` | {told} |"


def section(package: str) -> str:
    """The section of a package: those that are right everywhere in one row, every other in a row of its own."""
    every = {name: outcomes(kind) for name, kind in classes(PACKAGES[package]).items()}
    right = [name for name, found in every.items() if set(found.values()) == {RIGHT}]
    others = [row(name, found) for name, found in every.items() if name not in right]
    head = f"## {package}\n\nVersion {importlib.metadata.version(package)}: {len(right)} of {len(every)} are right.\n"
    all_right = [f"| {', '.join(f'`{name}`' for name in right)} | {RIGHT} |"] if right else []
    return "\n".join([head, "| optimizer | under RigL, SET and CTRE |", "| --- | --- |", *all_right, *others, ""])


def read(page: str) -> dict[str, dict[str, str]]:
    """What the page says: by package and optimizer, the text of the outcome."""
    found: dict[str, dict[str, str]] = {}
    for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| (`.*?`) \| (.*) \|$", part, re.MULTILINE)
        found[part.splitlines()[0]] = {n: text for names, text in rows for n in re.findall(r"`([^`]+)`", names)}
    return found


def main() -> None:
    """Write the sections of the packages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", help=f"of {', '.join(PACKAGES)}; default: all that are installed")
    asked = parser.parse_args().packages
    torch.set_num_threads(1)
    for package in asked or PACKAGES:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if asked:
                raise
            print(f"{package} is not installed: its section stays as it is")
            continue
        made = section(package).rstrip()
        head, *parts = re.split(r"^(?=## )", PAGE.read_text(), flags=re.MULTILINE)
        sections = {part.splitlines()[0].removeprefix("## "): part.rstrip() for part in parts}
        sections[package] = made
        in_order = [sections[name] for name in PACKAGES if name in sections]
        PAGE.write_text("\n\n".join([head.rstrip(), *in_order]) + "\n")
        print(package, "is written")


if __name__ == "__main__":
    main()
