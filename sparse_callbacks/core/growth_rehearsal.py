"""A rehearsal of growth on stand-ins: how far grown weights step, and on what that depends."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_callbacks.core.error_text import with_class
from sparse_callbacks.core.first_steps import UnknownStateError, first_steps
from sparse_callbacks.core.fresh_state import FreshState
from sparse_callbacks.core.shadow_optimizer import Shadow

# Some optimizers do in later steps what they leave out in the first.
_STEPS_BEFORE_GROWTH = 24
# Some use what they keep in every sixth or tenth step alone, as Lookahead does.
_STEPS_AFTER_GROWTH = 12
# The last step before the weights are pruned, in the one life and in the other. Both are late, as what an optimizer keeps of
# pruned weights may fade, and they differ, as it may be a count of steps.
_PRUNED_AFTER, _OTHER_PRUNED_AFTER = 20, 16
# Values and gradients of the other life, as multiples of those of the one.
_OTHER_VALUES, _OTHER_GRADIENTS = -2.0, -3.0
# How many times the first step of a grown weight may be larger or smaller than those of the others. In Adam it is 3 times as
# large, and 50 times in some that average their step sizes; a wrong code or a missing mean square makes hundreds.
_LARGER, _SMALLER = 100.0, 1000.0
_UNRESOLVED = 1e-6  # smaller steps are lost in the rounding of weights
# How far grown weights of the two lives may be apart: as a share of their way since, and in terms of how far the weights
# that were never pruned are apart, which is up to 11 under factored mean squares (timm's AdafactorBigVision).
_SHARE_OF_WAY, _TIMES_OTHERS = 0.01, 30.0


def rehearse_growth(optimizer: Optimizer, fresh: FreshState, parameters: Sequence[Tensor]) -> None:
    """Let two shadows train with one half of each weight pruned, and look at the steps of that half once it has grown.

    In the two shadows that half has two lives before it is pruned: other values, other gradients, another length. All else
    is the same. A grown weight is a fresh one, so whatever its life was, its steps are the same. Where they are not, the
    optimizer keeps something of single weights that :class:`FreshState` does not reach.

    Optimizers that mix weights, by norms, factors or rotations, let the earlier life of one weight have an effect on all of
    them, which is theirs to decide and no matter of fresh state. There the weights that were never pruned come apart as
    well: grown ones may do so as far as these, and several times that, as their gradients were the ones that differed.

    Args:
        optimizer: the optimizer to rehearse.
        fresh: writes the state of grown weights.
        parameters: the sparse parameters of the optimizer.

    Raises:
        UnknownStateError: the first step of a grown weight is far larger or smaller than those of the others, or steps of grown
            weights depend on their earlier life.
    """
    one, other = (_Life(optimizer, fresh, parameters, other) for other in (False, True))
    for i in map(id, parameters):
        old = one.shadow.has_gradient(one.shadow.stand_ins[i])
        moved = one.first_moves[i].abs()
        _compare_first(moved[~old], moved[old], one.begun[i].abs()[old])
        _compare_lives(one.moves[i], other.moves[i], ~old)


class _Life:
    """A shadow that trains, while one half of each weight lives, is pruned, and grows again.

    Raises:
        UnknownStateError: the optimizer cannot be stepped, or fresh state is not known.
    """

    def __init__(self, optimizer: Optimizer, fresh: FreshState, parameters: Sequence[Tensor], other: bool) -> None:
        self._other, self._generator = other, torch.Generator()
        self._pruned_after = _OTHER_PRUNED_AFTER if other else _PRUNED_AFTER

        def make(whole: bool) -> Shadow:
            self._generator.manual_seed(0)
            return Shadow(optimizer, seed=0, whole=whole, idle_values=_OTHER_VALUES if other else 1.0)

        self.begun: dict[int, Tensor] = {}
        """How far each stand-in moved in the first step, in which all of its weights are fresh."""
        self.shadow = first_steps(make, self._give, steps=_STEPS_BEFORE_GROWTH)
        self.shadow.prune()
        for parameter in parameters:
            grown = ~self.shadow.has_gradient(self.shadow.stand_ins[id(parameter)])
            fresh.write_stand_in(self.shadow, parameter, grown)
        begin = self._values()
        self._step()
        self.first_moves = self._since(begin)
        """How far each stand-in moved in the first step after the growth."""
        for _ in range(_STEPS_AFTER_GROWTH - 1):
            self._step()
        self.moves = self._since(begin)
        """How far each stand-in moved in all steps after the growth."""

    def _values(self) -> dict[int, Tensor]:
        return {i: p.detach().clone() for i, p in self.shadow.stand_ins.items()}

    def _since(self, begin: dict[int, Tensor]) -> dict[int, Tensor]:
        return {i: p.detach() - begin[i] for i, p in self.shadow.stand_ins.items()}

    def _step(self) -> None:
        try:
            self.shadow.step(lambda: self._give(self.shadow))
        # whatever somebody's optimizer raises
        except Exception as error:
            raise UnknownStateError(f"a step after weights have grown fails ({with_class(error)})") from error

    def _give(self, shadow: Shadow) -> None:
        """Gradients of the step that begins, and no values and gradients of what is pruned in it."""
        if shadow.taken == 1:
            self.begun = {i: -before for i, before in shadow.before.items()}
        elif shadow.taken == 2:
            self.begun = {i: moved + shadow.before[i] for i, moved in self.begun.items()}
        lives = shadow.taken <= _STEPS_BEFORE_GROWTH
        pruned = lives and shadow.taken > self._pruned_after
        if pruned:
            shadow.prune()
        factor = 0.0 if pruned else _OTHER_GRADIENTS if lives and self._other else 1.0
        drawn: dict[
            tuple[torch.Size, torch.dtype, torch.device], Tensor
        ] = {}  # one for all of a shape, as drawing takes long
        for p in shadow.stand_ins.values():
            key = p.shape, p.dtype, p.device
            if key not in drawn:
                made = 0.01 * torch.randn(p.shape, generator=self._generator).to(p)
                drawn[key] = made if factor == 1 else torch.where(shadow.has_gradient(p), made, factor * made)
            p.grad = drawn[key].clone() if p.requires_grad else None


def _compare_first(grown: Tensor, others: Tensor, begun: Tensor) -> None:
    if not grown.numel() or not others.numel():
        return
    if not bool(grown.isfinite().all()):
        whose = "a new weight" if bool(begun.isfinite().all()) else "any weight"
        raise UnknownStateError(f"the first step of {whose} is NaN or infinite in {grown.dtype}")
    largest = max(float(others.max()), float(begun.max()), _UNRESOLVED)
    if not grown.max() <= _LARGER * largest:
        raise UnknownStateError(
            f"the first step of a new weight is {float(grown.max()) / largest:.0f} times as large as those of the others"
        )
    if grown.median() * _SMALLER < others.median() - _UNRESOLVED:
        raise UnknownStateError("new weights do not move: it takes no step from fresh state")


def _compare_lives(one: Tensor, other: Tensor, grown: Tensor) -> None:
    if not grown.any() or grown.all():
        return
    apart, way = (one - other).abs().double(), torch.maximum(one.abs(), other.abs()).double()
    far, length = float(apart[grown].mean()), float(way[grown].mean())
    # an optimizer that has diverged on gradients of no network is NaN in both lives, and compares as False
    if far > max(_SHARE_OF_WAY * length, _TIMES_OTHERS * float(apart[~grown].mean()), _UNRESOLVED):
        raise UnknownStateError(
            f"the steps of a grown weight depend on what it was before it was pruned (by {far / length:.0%} of their length), "
            "so the optimizer keeps tensors of the weights outside of optimizer.state[parameter], such as in an attribute or a "
            "parameter group, or there in another shape than the weights', where they are not reset"
        )
