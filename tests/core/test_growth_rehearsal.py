"""What an optimizer keeps of single weights out of reach is found before the first batch, wherever it keeps it."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data import loader
from support.nets import Regression, mlp
from support.optimizers import Stepping, Whole, parameters_of
from torch import Tensor, nn

from sparse_callbacks import GMP, SET, methods, sparsify
from sparse_callbacks.testing.runs import trainer_for

DEPENDS = r"SET grows weights.*the steps of a grown weight depend on what it was before it was pruned \(by \d+% of"


class Momentum(Stepping):
    """Momentum that a subclass keeps somewhere."""

    def kept(self, p: Tensor, state: Any) -> Tensor:
        raise NotImplementedError

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
        p.sub_(self.kept(p, state).mul_(0.9).add_(gradient), alpha=group["lr"])


class InList(Momentum):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.momenta = [torch.zeros_like(p) for p in parameters_of(self)]

    def kept(self, p: Tensor, state: Any) -> Tensor:
        return self.momenta[[q is p for q in parameters_of(self)].index(True)]


class ById(Momentum):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.momenta = {"all": {id(p): torch.zeros_like(p) for p in parameters_of(self)}}

    def kept(self, p: Tensor, state: Any) -> Tensor:
        return self.momenta["all"][id(p)]


class ByParameter(Momentum):
    def kept(self, p: Tensor, state: Any) -> Tensor:
        return vars(self).setdefault("momenta", {}).setdefault(p, torch.zeros_like(p))


class FlatInGroup(Momentum):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        for group in self.param_groups:
            group["flat"] = torch.zeros(sum(p.numel() for p in group["params"]))

    def kept(self, p: Tensor, state: Any) -> Tensor:
        group = self.param_groups[0]
        parts = group["flat"].split([q.numel() for q in group["params"]])
        return parts[[q is p for q in group["params"]].index(True)].view(p.shape)


class TransposedState(Momentum):
    def kept(self, p: Tensor, state: Any) -> Tensor:
        kept = state.setdefault("momentum", torch.zeros_like(p.t().contiguous() if p.ndim == 2 else p))
        return kept.t() if p.ndim == 2 else kept


class PaddedState(Momentum):
    def kept(self, p: Tensor, state: Any) -> Tensor:
        return state.setdefault("momentum", torch.zeros(p.numel() + 5))[: p.numel()].view(p.shape)


class FlatState(Momentum):
    """Of the weights' order: it is reset."""

    def kept(self, p: Tensor, state: Any) -> Tensor:
        return state.setdefault("momentum", torch.zeros(p.numel())).view(p.shape)


class SquaresOutside(Stepping):
    """Its first moments are reset, and its second ones are not."""

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
        squares = vars(self).setdefault("squares", {}).setdefault(p, torch.zeros_like(p)).lerp_(gradient.square(), 0.01)
        mean = state.setdefault("mean", torch.zeros_like(p)).lerp_(gradient, 0.1)
        p.sub_(mean / (squares.sqrt() + 1e-8), alpha=1e-3)


class CountsOutside(Stepping):
    """Steps get smaller with the number of gradients that a weight has had."""

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
        count = vars(self).setdefault("counts", {}).setdefault(p, torch.zeros_like(p)).add_(gradient != 0)
        p.sub_(gradient / count.clamp(min=1), alpha=group["lr"])


class Around(torch.optim.Optimizer):
    """A wrapper that shares the groups of the optimizer within."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class SlowWeights(Around):
    """Lookahead as it is often written: slow weights in a list of lists, used in every sixth step."""

    def __init__(self, params: Any) -> None:
        super().__init__(torch.optim.AdamW(params, lr=0.01))
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]
        self.taken = 0

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.taken += 1
        with torch.no_grad():
            for p, slow in zip(parameters_of(self), self.slow[0], strict=True):
                if self.taken % 6 == 0 and p.grad is not None:
                    p.copy_(slow.lerp_(p, 0.5))
        return loss


class PulledToItsBeginning(Stepping):
    """Copies of the weights that its constructor made; a weak pull, far below the size of a step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.begin = [p.detach().clone() for p in parameters_of(self)]

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for p, begin in zip(parameters_of(self), self.begin, strict=True):
                p.lerp_(begin, 1e-3)
        return loss

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
        p.sub_(gradient, alpha=group["lr"])


class Scratch(InList):
    """Tensors of the weights that nothing is kept in."""

    def kept(self, p: Tensor, state: Any) -> Tensor:
        return super().kept(p, state).zero_()


class NormOfAll(Whole):
    """All steps depend on all gradients that there were."""


OUT_OF_REACH = [
    InList,
    ById,
    ByParameter,
    FlatInGroup,
    TransposedState,
    PaddedState,
    SquaresOutside,
    CountsOutside,
    SlowWeights,
    PulledToItsBeginning,
    lambda p: Around(InList(p)),
    lambda p: Around(TransposedState(p)),
]
IN_REACH = [FlatState, Scratch, NormOfAll, lambda p: Around(FlatState(p))]
# square layers, layers that stand-ins are smaller than, and others
NETS = {"square": [16, 16, 16], "large": [16, 128, 128, 4], "other": [8, 20, 6]}


def made_net(sizes: list[int]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def begun(method: Any, net: nn.Module, make: Callable[..., Any]) -> Any:
    return sparsify(method(0.5, every=2, stop=6, print_plan=False), net, make(net.parameters()), 6)


def named(kinds: list[Any]) -> Any:
    return pytest.mark.parametrize("make", kinds, ids=lambda k: getattr(k, "__name__", "wrapped").strip("<>"))


@pytest.mark.parametrize("sizes", NETS.values(), ids=NETS.keys())
@named(OUT_OF_REACH)
def test_what_a_reset_does_not_reach_is_refused_where_weights_grow(make: Any, sizes: list[int]) -> None:
    net = made_net(sizes)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    with pytest.raises(ValueError, match=DEPENDS + r".*outside of optimizer\.state\[parameter\].*such as Static, GMP"):
        begun(methods.SET, net, make)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert begun(methods.GMP, net, make).masks


@pytest.mark.parametrize("sizes", NETS.values(), ids=NETS.keys())
@named(IN_REACH)
def test_what_is_reset_or_mixes_all_weights_is_not_refused(make: Any, sizes: list[int]) -> None:
    begun(methods.SET, made_net(sizes), make)


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.Muon], ids=lambda k: k.__name__)
def test_factors_and_rotations_of_torch_are_not_refused(kind: Any) -> None:
    net = made_net([16, 16, 16])
    matrices = [p for p in net.parameters() if p.ndim == 2]
    sparsify(methods.RigL(0.5, every=2, stop=6, print_plan=False), net, kind(matrices, lr=0.01), 6)


def test_a_trainer_refuses_the_same(tmp_path: Path) -> None:
    def fit(callback: Any) -> Regression:
        module = Regression(mlp(12, 20, 20, 6), configure=SlowWeights)
        trainer_for(callback, tmp_path, max_steps=4).fit(module, loader(4))
        return module

    with pytest.raises(ValueError, match=DEPENDS):
        fit(SET(0.5, every=2, stop=6, print_plan=False))
    assert fit(GMP(0.5, every=2, stop=4, print_plan=False)).batches == 4


def test_steps_that_are_nan_in_half_precision_are_said_so() -> None:
    class Own(torch.optim.Adam):
        """Whose small constant is 0 in float16."""

    net = made_net([8, 20, 6]).half()
    with pytest.raises(ValueError, match=r"the first step of any weight is NaN or infinite in torch\.float16"):
        begun(methods.SET, net, lambda p: Own(p, foreach=False))
