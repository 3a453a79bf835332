"""Torch optimizers under masks: which can keep a mask, which parameters they step, and their state."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_callbacks.core.error_text import first_line
from sparse_callbacks.core.fresh_state import FreshState
from sparse_callbacks.core.local_parts import local, whole_of
from sparse_callbacks.core.optimizer_modes import refuse_modes

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
        self.steps = [
            [n for n, p in params.items() if id(whole_of(p)) in ids] for ids in map(parameter_ids, optimizers)
        ]
        """Names of the parameters that each optimizer steps."""
        # backwards, so that of several optimizers that step a parameter the first is written last and stays
        first = {n: i for i in reversed(range(len(optimizers))) for n in self.steps[i]}
        self.owns = [[n for n in names if first[n] == i] for i, names in enumerate(self.steps)]
        """Names of the parameters that belong to each optimizer, whose masks are updated on its calendar."""
        self.fresh = [FreshState(o) for o in optimizers]
        """What the state of fresh weights is in each optimizer."""
        self._params = params

    @classmethod
    def between_runs(cls, owned: Sequence[Sequence[str]], params: Mapping[str, Tensor], optimizers: int) -> Self:
        """Which parameters belong together where no optimizer is there.

        Args:
            owned: names of the parameters that belonged to each optimizer; may be wrong, or empty.
            params: the sparse parameters by name.
            optimizers: the number of optimizers. Where ``owned`` does not fit, all parameters belong to the first.
        """
        made = cls([], params)
        fits = len(owned) == optimizers and params.keys() >= {n for names in owned for n in names}
        made.owns = [list(names) for names in owned] if fits else [list(params), *[[]] * (optimizers - 1)]
        return made

    def parameters_of(self, index: int) -> list[Tensor]:
        """The sparse parameters that an optimizer steps."""
        return [whole_of(self._params[name]) for name in self.steps[index]]

    def index(self, optimizer: Optimizer) -> int:
        """Position of ``optimizer`` among the optimizers of the run."""
        return self.optimizers.index(optimizer)

    def clear(self, name: str, where: Tensor, is_zero: bool = False) -> None:
        """Give a parameter the state of fresh weights at ``where`` (bool, of its shape), in every optimizer that steps
        it; ``is_zero`` says that state of its shape is 0 there already."""
        for fresh, names in zip(self.fresh, self.steps, strict=True):
            if name in names:
                fresh.write(self._params[name], where, is_zero)


def group_numbers(optimizer: Optimizer) -> list[dict[str, float]]:
    """The numbers in each parameter group: arguments, and what some optimizers count for a group and not for each
    parameter."""
    return [{k: v for k, v in group.items() if isinstance(v, int | float)} for group in optimizer.param_groups]


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
        ValueError: LBFGS (several closure calls a step), a fused optimizer under a GradScaler, one without hooks, or modes of
            training and evaluation that are not those of ``schedulefree``.
    """
    optimizers = list(optimizers)
    _refuse_without_hooks(optimizers)
    refuse_modes(optimizers)
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(several_closures(name))
        # the attribute by which a GradScaler leaves unscaling to the optimizer
        if scaler and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(_unscales_itself(name, "precision='16-mixed'", "precision='bf16-mixed'"))


def _refuse_without_hooks(optimizers: Iterable[Optimizer]) -> None:
    for optimizer in optimizers:
        try:
            optimizer.register_step_post_hook(lambda *_: None).remove()
            _ = optimizer.state, optimizer.defaults
        except AttributeError as error:
            name = type(optimizer).__name__
            raise ValueError(
                f"{name} has not all that an optimizer of torch has ({first_line(error)}): its constructor does not call "
                "super().__init__(params, defaults), so nothing is called after its steps and no mask could be kept. Call "
                f"it in {name}.__init__, or use another optimizer, such as torch.optim.AdamW."
            ) from error


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


def second_gradient(name: str) -> str:
    """The error for an optimizer, named ``name``, that asks for gradients a second time within a step of the training."""
    return (
        f"{name} asked for gradients a second time within one step, and did not do so in the steps that were tried before "
        "the first batch. It may have moved the weights in between, as sharpness-aware minimization does in every k-th "
        "step, and nothing shows when they are back. Let it perturb them in its first steps too, and hold an optimizer "
        "of torch that takes the step (self.base_optimizer), or use one with one gradient a step, such as SGD or AdamW. "
        "Masks, dense values and counts are those of the last step; the weights are where it has moved them, so go on "
        "from a checkpoint."
    )


@torch.no_grad()
def clear_non_finite_state(optimizer: Optimizer, parameter: Tensor, where: Tensor) -> None:
    """Zero the state of ``parameter`` at some positions (bool, of its shape), as far as it is inf or NaN there.

    State of another shape, and coded state, stays.
    """
    for value in map(local, optimizer.state.get(whole_of(parameter), {}).values()):
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
            value.masked_fill_(where & ~value.isfinite(), 0)


@torch.no_grad()
def avoid_slow_square_roots(optimizer: Optimizer, fresh: FreshState, parameter: Tensor, pruned: Tensor) -> None:
    """Give the mean squared gradient of ``pruned`` weights (bool, shape of ``parameter``) a small normal value, and the
    rest of their state what ``fresh`` weights have, so that an optimizer on the CPU steps faster.

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
        or key not in optimizer.state.get(whole_of(parameter), {})
    ):
        return
    fresh.write(parameter, pruned)  # a leftover first moment over a small root would be a huge update
    local(optimizer.state[whole_of(parameter)][key]).masked_fill_(pruned, _SMALL_MEAN_SQUARE)


def all_finite(gradients: Sequence[Tensor]) -> Tensor | bool:
    """Whether no element of ``gradients`` is inf or NaN.

    A bool for gradients on the CPU. On other devices a 0-d bool tensor, so that the caller decides when to wait for it.
    """
    if all(g.device.type == "cpu" for g in gradients):
        # a sum reads the memory once, but finite values can overflow it: only then is each element checked
        return all(math.isfinite(g.sum().item()) or bool(g.isfinite().all()) for g in gradients)
    # one number for each gradient, and a single one to wait for; the maximum of magnitudes is NaN where one of them is
    return torch.stack([g.abs().amax().to(gradients[0].device) for g in gradients]).isfinite().all()
