"""What must hold after every step of every run."""

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from support.methods import promises
from torch import Tensor, nn

from properties.cases import Case
from properties.setup import make_optimizers
from sparse_callbacks import to_dense
from sparse_callbacks.core.live.live_masks import exchanged_layers
from sparse_callbacks.core.ops import zeros_for
from sparse_callbacks.core.optimizer_life import RestartsOptimizers
from sparse_callbacks.testing.comparison import (
    assert_counts,
    assert_effective,
    differences,
    per_element_state,
    structure,
)

# an error says what is wrong in a sentence, and in another what to do
SENTENCE = re.compile(r"[a-z)\]'\"=0-9].*\.(\s|$)", re.DOTALL)
REMEDY = re.compile(
    r"\b(Give|Use|Keep|Train|Drop|Leave|Change|Remove|Make|Call|Let|Choose|Set|Load|Resume|Put|Run|Begin|Name|Lower|Raise|lower|exclude)\b"
)


def is_documented_refusal(error: BaseException, batches: int) -> bool:
    """A refusal: a ValueError before the first training batch, which says what is wrong and what to do."""
    text = str(error)
    return isinstance(error, ValueError) and not batches and bool(SENTENCE.search(text) and REMEDY.search(text))


class Watch:
    """Checks a run after each of its steps.

    Args:
        case: the run.
        method: the method or callback whose masks these are.
        module: the module whose parameters the masks name.
    """

    def __init__(self, case: Case, method: Any, module: nn.Module) -> None:
        self.case, self.method, self.module = case, method, module
        self.keys = list(module.state_dict())
        self.masks: Mapping[str, Tensor] = {}
        self.batches = self.born = 0

    def begin(self) -> None:
        """Masks are written, and no step was taken."""
        self.masks = copy.deepcopy(self.method.masks)

    def batch_over(self, optimizers: list[Any]) -> None:
        """A micro-batch is over, and with it perhaps a step."""
        self.batches += 1
        assert_effective(self.module, self.method)
        assert list(self.module.state_dict()) == self.keys
        infinite = [n for n, p in self.module.named_parameters() if not p.isfinite().all()]
        assert not infinite, f"{infinite} are not finite"
        self._born_weights(optimizers)
        if promises(self.case.method, "planned counts"):
            self._counts()
        self.masks = copy.deepcopy(self.method.masks)

    def _counts(self) -> None:
        method = self.method
        if getattr(method, "neuron_importance", None) is not None or getattr(method, "ablation", None) is not None:
            assert sum(int((~m).sum()) for m in method.masks.values()) >= method.plan().zeros
            return
        if method.at_target and self._in_whole_filters():
            assert sum(int((~m).sum()) for m in method.masks.values()) <= method.plan().zeros
            return
        if method.at_target:
            assert_counts(method)
            return
        steps = [method.progress.counts[i].read() for i, names in enumerate(method.owners.owns) if names]
        assert min(steps, default=0) < method.times.stop, f"not at target after {steps} steps: {method.times}"
        if type(method).__name__ in ("GMP", "DPF") and isinstance(method.sparsity, float) and self._by_layer():
            for index, names in enumerate(method.owners.owns):
                for name in names if index in method.progress.done else ():
                    self._count_on_curve(name, method.progress.done[index])

    def _in_whole_filters(self) -> bool:
        """Filters of all layers are pruned together, as many as fit the target."""
        return getattr(self.method, "unit", "") == "filter" and self.method.distribution == "global"

    def _by_layer(self) -> bool:
        return self.method.distribution != "global" and getattr(self.method, "unit", "weight") == "weight"

    def _count_on_curve(self, name: str, number: int) -> None:
        """The zeros of each layer are those of Zhu and Gupta's cubic at the latest update."""
        start, stop = self.method.times.start, self.method.times.stop
        share = 1 - (1 - min(1.0, max(0.0, (number - start) / max(1, stop - start)))) ** 3
        for layer, (mask,) in self.method.weights.layers(name, self.method.masks[name]):
            zeros, planned = int((~mask).sum()), zeros_for(self.method.targets[layer] * share, mask.numel())
            # a product of floats may come to lie on the other side of a whole number
            assert abs(zeros - planned) <= 1, f"{layer}: {zeros} zeros after the update of step {number}, not {planned}"

    def _born_weights(self, optimizers: list[Any]) -> None:
        """A weight that was grown starts from zero, or as its method says, and its optimizer knows nothing of it."""
        case, method = self.case, self.method
        if not promises(case.method, "one network") or not method.plans_counts:
            return
        parameters = dict(self.module.named_parameters())
        for name, mask in method.masks.items():
            born = mask & ~self.masks[name]
            if not born.any():
                continue
            self.born += int(born.sum())
            if (layer := method.weights.layers_stored.get(name)) is not None:  # whose Parameter has live weights alone
                born = layer.places.read(born)
            weight = parameters[name].detach()
            if method.keeps_dense:  # a copy that has just ended gave its values all the same
                assert torch.equal(weight[born], method.weights.dense_values(name)[born]), name
                continue
            at_random = method.arguments.get("new_weights") == "'uniform'"
            if promises(case.method, "grown weights start from zero") and not at_random:
                assert not weight[born].any(), f"{name}: grown weights are not zero"
            else:  # uniform in +-sqrt(6 / inputs)
                bound = (6 / torch.Size(method.weights.entries[name].shape[1:]).numel()) ** 0.5
                assert weight[born].abs().max() <= bound * 1.01, f"{name}: grown weights exceed {bound}"
            self._fresh_state(name, parameters[name], born, optimizers)

    def _fresh_state(self, name: str, parameter: Tensor, born: Tensor, optimizers: list[Any]) -> None:
        if isinstance(self.method, RestartsOptimizers) and self.method.restarts:
            return  # a new optimizer comes at once
        if self.case.schedule and self.case.optimizer.name == "Rprop":
            return  # its steps begin at the rate of the moment or at that of the start: both are fresh
        fresh = fresh_state(self.case, parameter)
        for optimizer in (o for o in optimizers if parameter in o.state):  # asking creates an entry
            for kind, value in per_element_state(optimizer, parameter).items():
                # ASGD decays a weight in its step by itself, before it keeps a copy; a zero has to be a zero
                same = torch.isclose(value[born], fresh[kind][born], rtol=1e-2, atol=0.0)
                assert same.all(), f"{name}: {kind} of grown weights is not fresh"


def fresh_state(case: Case, parameter: Tensor) -> Mapping[str, Tensor]:
    """State of an optimizer that has just met these values, with a gradient of zero and no decay."""
    stranger = nn.Parameter(parameter.detach().clone())
    stranger.grad = torch.zeros_like(stranger)
    (optimizer,) = make_optimizers(case, [("weight", stranger)], decay=0.0)
    optimizer.step()
    return per_element_state(optimizer, stranger)


def same_values(before: Any, after: Any) -> bool:
    """Equal values; the Trainer may have converted the network to another precision."""
    return all(torch.equal(before[n].to(t.dtype), t) for n, t in after.items())


def facts(net: nn.Module) -> dict[str, Any]:
    """What training must leave as it was: everything in a model but the values of its tensors."""
    return structure(net) | {"modes": {n: m.training for n, m in net.named_modules()}}


def assert_left_as_it_was(before: Mapping[str, Any], net: nn.Module) -> None:
    """A run has left in a model what :func:`facts` found in it, once exchanged layers are dense again."""
    if not exchanged_layers(net):
        assert differences(before, facts(net)) == []
        return
    after = facts(to_dense(copy.deepcopy(net)))
    # a copy has Parameters of its own
    assert differences({**before, "parameters": None}, {**after, "parameters": None}) == []


def assert_no_hooks(optimizers: Any) -> None:
    """The run has taken its hooks away from the optimizers."""
    left = [len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in optimizers]
    assert not any(left), f"{left} hooks are left on the optimizers"
