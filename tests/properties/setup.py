"""Optimizers, data and precision of a random run."""

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from properties.cases import EPOCHS, OPTIMIZERS, Case
from sparse_callbacks.testing.comparison import differences
from sparse_callbacks.testing.data import Batches

DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16}
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
CLIP = {
    "norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.3),
    "value": lambda parameters: nn.utils.clip_grad_value_(parameters, 0.05),
}
SIZE = 4  # samples of a micro-batch


class Data(Batches):
    """Micro-batches for a network, in an order whose position can be resumed."""

    def __init__(self, case: Case) -> None:
        super().__init__(case.batches, SIZE)
        self.x, self.y = case.network.batch(case.batches * SIZE, torch.Generator().manual_seed(1))


def micro_batches(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Every micro-batch of the run, in order."""
    data, found = Data(case), []
    for epoch in range(EPOCHS):
        data.set_epoch(epoch)
        found += list(data)
    return found


def make_optimizers(
    case: Case, named: Iterable[tuple[str, nn.Parameter]], decay: float | None = None
) -> list[torch.optim.Optimizer]:
    """The optimizers of the run; with two, each steps every other parameter with more than one dimension.

    Args:
        case: the run.
        named: all parameters.
        decay: the weight decay in place of that of the run.
    """
    spec, parameters = case.optimizer, list(named)
    cls: Any = getattr(torch.optim, spec.name.split(" ")[0])
    options = dict(OPTIMIZERS[spec.name])
    options |= {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}, "": {}}[spec.how]
    if spec.decay if decay is None else decay:
        options["weight_decay"] = spec.decay
    shares = [parameters[::2], parameters[1::2]] if spec.two and len(parameters) > 1 else [parameters]
    return [cls(_groups(case, share), **options) for share in shares]


def _groups(case: Case, named: list[tuple[str, nn.Parameter]]) -> list[Any]:
    if not case.optimizer.groups or len({p.ndim > 1 for _, p in named}) < 2:
        return [p for _, p in named]
    flat = {"params": [p for _, p in named if p.ndim < 2]}
    return [{"params": [p for _, p in named if p.ndim > 1]}, flat]


def autocast(case: Case) -> AbstractContextManager[Any]:
    """The precision of the forward pass in a hand-written loop."""
    dtype = AUTOCAST.get(case.precision)
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def built(case: Case) -> nn.Module:
    """The network in the precision of the run."""
    dtype = DTYPES.get(case.precision)
    return case.network.build().to(dtype) if dtype else case.network.build()


def loss_of(net: Callable[[Tensor], Tensor], batch: Any, factor: float = 1.0) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]).float(), batch[1]) * factor


def loss_factor(case: Case, number: int) -> float:
    """Of the loss of a micro-batch."""
    return math.inf if number in case.inf_at else 1.0


def ends_window(case: Case, index: int) -> bool:
    """Whether a step follows the micro-batch with this index in its epoch."""
    return (index + 1) % case.window == 0 or index + 1 == case.batches


def loads_exactly(case: Case) -> bool:
    """Whether torch itself resumes the optimizer bitwise: it rounds NAdam's float32 products to a bfloat16 parameter's
    type, for one."""
    net = built(case)
    loss_of(net, micro_batches(case)[0]).backward()
    for optimizer in make_optimizers(case, net.named_parameters()):
        optimizer.step()
        before = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(before)
        if differences(before, optimizer.state_dict()):
            return False
    return True


def why_not_in_torch(case: Case) -> str:
    """Why torch itself cannot train the network dense in this precision; empty where it can."""
    net = built(case)
    try:
        with autocast(case):
            loss = loss_of(net, micro_batches(case)[0])
        loss.backward()
        for optimizer in make_optimizers(case, net.named_parameters()):
            if not isinstance(optimizer, torch.optim.LBFGS):
                optimizer.step()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Refused(Exception):  # noqa: N818  it is what the run should have done
    """The run was refused as documented, and nothing was changed."""


def method_of(case: Case, module: nn.Module, cls: Any) -> Any:
    """The method of a run."""
    given = dict(case.arguments)
    if "from_checkpoint" in given:
        generator = torch.Generator().manual_seed(5)
        share = given["from_checkpoint"]["zeros"]
        state = {n: p.detach().clone() for n, p in module.state_dict().items()}
        given["from_checkpoint"] = {
            n: p.masked_fill(torch.rand(p.shape, generator=generator) < share, 0) if p.ndim > 1 else p
            for n, p in state.items()
        }
    return cls(**given)
