"""Torch optimizers under masks: which can keep a mask, which parameters they step, and their state."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

# Each weight's update depends on that weight's own gradient and state alone, so masking the weights after the step is
# enough.
_ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    torch.optim.ASGD,
    torch.optim.Rprop,
)


# The state whose square root each of these optimizers takes in every step.
_SQUARE_ROOT_STATE = {
    torch.optim.Adam: "exp_avg_sq",
    torch.optim.AdamW: "exp_avg_sq",
    torch.optim.NAdam: "exp_avg_sq",
    torch.optim.RAdam: "exp_avg_sq",
    torch.optim.RMSprop: "square_avg",
    torch.optim.Adagrad: "sum",
}
# Far above float32's smallest normal number (2**-126): it stays a normal number over a hundred decays by 0.6.
_SMALL_MEAN_SQUARE = 2.0**-40


def parameter_ids(*optimizers: Optimizer) -> set[int]:
    """``id`` of every parameter that one of ``optimizers`` steps."""
    return {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}


class Ownership:
    """Which optimizer (by index) steps which sparse parameter.

    A parameter in several optimizers belongs to the first: its mask is updated on the calendar of the first optimizer,
    and stays applied after the steps of every one.
    """

    def __init__(self, optimizers: Sequence[Optimizer], params: Mapping[str, Tensor]) -> None:
        self.optimizers = list(optimizers)
        self.steps = [[n for n, p in params.items() if id(p) in ids] for ids in map(parameter_ids, optimizers)]
        """Names of the parameters that each optimizer steps."""
        # backwards, so that of several optimizers that step a parameter the first is written last and stays
        first = {n: i for i in reversed(range(len(optimizers))) for n in self.steps[i]}
        self.owns = [[n for n in names if first[n] == i] for i, names in enumerate(self.steps)]
        """Names of the parameters that belong to each optimizer, whose masks are updated on its calendar."""
        self._params = params

    def index(self, optimizer: Optimizer) -> int:
        """Position of ``optimizer`` among the optimizers of the run."""
        return self.optimizers.index(optimizer)

    def clear(self, name: str, where: Tensor) -> None:
        """:func:`clear_state` in every optimizer that steps the parameter."""
        for optimizer, names in zip(self.optimizers, self.steps, strict=True):
            if name in names:
                clear_state(optimizer, self._params[name], where)


def is_elementwise(optimizer: Optimizer) -> bool:
    """Whether a pruned weight's gradient cannot change another weight's update.

    Only the listed classes count: a subclass may override ``step`` and do anything, so it gives False.
    """
    return type(optimizer) in _ELEMENTWISE


def refuse(optimizers: Iterable[Optimizer], scaler: bool) -> None:
    """Refuse optimizers under which a mask cannot be kept.

    Args:
        optimizers: every optimizer of the run.
        scaler: True where a GradScaler scales the loss (fp16).

    Raises:
        ValueError: LBFGS (several closure calls a step), or a fused optimizer under a GradScaler.
    """
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(several_closures(name))
        # the attribute by which a GradScaler leaves unscaling to the optimizer
        if scaler and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(_unscales_itself(name, "precision='16-mixed'", "precision='bf16-mixed'"))


def refuse_scaled_step(optimizer: Optimizer) -> None:
    """Refuse a step in which the optimizer itself unscales the gradients, called by a GradScaler.

    Raises:
        ValueError: the optimizer is fused.
    """
    # attributes that torch's GradScaler sets on the optimizer right before such a step, and takes away after it
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        raise ValueError(_unscales_itself(type(optimizer).__name__, "a GradScaler", "autocast to bfloat16 without one"))


def _unscales_itself(name: str, scaled: str, instead: str) -> str:
    """The error for a fused optimizer under a GradScaler.

    Args:
        name: the name of the optimizer's class.
        scaled: what brings the GradScaler.
        instead: half precision that needs none.
    """
    return (
        f"{name}(fused=True) under {scaled} unscales the gradients inside its step and steps even when they are "
        f"infinite, so a mask update could be lost. Use {instead}, or fused=False."
    )


def several_closures(name: str) -> str:
    """The error for an optimizer, named ``name``, that calls its closure several times in a step."""
    return (
        f"{name} calls its closure several times in one step, so there is no single gradient that a mask update could "
        "use. Use an optimizer with one gradient a step, such as SGD or AdamW."
    )


@torch.no_grad()
def clear_state(optimizer: Optimizer, parameter: Tensor, where: Tensor) -> None:
    """Zero every per-element state tensor (momentum, exp_avg, exp_avg_sq, ...) of ``parameter`` at some positions.

    ``where`` is a bool tensor of the parameter's shape, True at these positions. Scalars such as Adam's ``step`` stay;
    a parameter without state yet is left alone.
    """
    for value in optimizer.state.get(parameter, {}).values():
        # by shape and not by name: the state of any optimizer, whatever it calls it
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.masked_fill_(where, 0)


@torch.no_grad()
def clear_non_finite_state(optimizer: Optimizer, parameter: Tensor, where: Tensor) -> None:
    """Zero the per-element state of ``parameter`` at some positions, see :func:`clear_state`, as far as it is inf or
    NaN."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
            value.masked_fill_(where & ~value.isfinite(), 0)


@torch.no_grad()
def avoid_slow_square_roots(optimizer: Optimizer, parameter: Tensor, pruned: Tensor) -> None:
    """Give the mean squared gradient of ``pruned`` weights (bool, shape of ``parameter``) a small normal value, and
    clear the rest of their state, so that an optimizer on the CPU steps faster.

    Call it only where the gradients of pruned weights are always zero. Their mean squares fade to zero then, and
    torch's CPU square root is some six times slower on zeros and denormals than on normal numbers. The written value
    has no effect on training: a pruned weight stays masked, and its state is cleared again when it grows. The state of
    active weights is not touched. Nothing is done for fused optimizers and on other devices, whose square roots are not
    slow.
    """
    key = _SQUARE_ROOT_STATE.get(type(optimizer))
    if (
        key is None
        or parameter.device.type != "cpu"
        or optimizer.defaults.get("fused")
        or key not in optimizer.state.get(parameter, {})
    ):
        return
    clear_state(optimizer, parameter, pruned)  # a leftover first moment over a small root would be a huge update
    optimizer.state[parameter][key].masked_fill_(pruned, _SMALL_MEAN_SQUARE)


def all_finite(gradients: Sequence[Tensor]) -> Tensor | bool:
    """Whether no element of ``gradients`` is inf or NaN.

    A bool for gradients on the CPU. On other devices a 0-d bool tensor, so that the caller decides when to wait for it.
    """
    if all(g.device.type == "cpu" for g in gradients):
        # a sum reads the memory once, but finite values can overflow it: only then is each element checked
        return all(math.isfinite(g.sum().item()) or bool(g.isfinite().all()) for g in gradients)
    # one number for each gradient, and a single one to wait for; the maximum of magnitudes is NaN where one of them is
    return torch.stack([g.abs().amax().to(gradients[0].device) for g in gradients]).isfinite().all()
