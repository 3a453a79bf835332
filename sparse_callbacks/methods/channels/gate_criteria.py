"""Taylor importance of a gate of one on each unit, which need not exist."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence, Set

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.groups import Group, Member
from sparse_callbacks.channels.module_sizes import is_layer
from sparse_callbacks.channels.norms import hides_its_channels
from sparse_callbacks.core.largest import widened
from sparse_callbacks.core.optimizers import parameter_ids
from sparse_callbacks.core.state_layout import damaged
from sparse_callbacks.core.step import Step
from sparse_callbacks.methods.channels import score_windows as windows
from sparse_callbacks.methods.channels.criteria import Criterion, ScoredNetwork, criterion, unit_scores

MOMENTUM = 0.9  # published: of the former score, at each pruning


def gates_of_slices(weight: Tensor, gradient: Tensor, dim: int = 0) -> Tensor:
    """Gradient of the loss at a gate of one on each output of a layer without a bias, or on each input, [slices].

    It is the sum of weight * gradient over the slice. Of a bias it is bias * its gradient, which is to be added.

    Args:
        weight, gradient: the layer's weight and the gradient of the loss.
        dim: the dimension along which the outputs, or the inputs, lie.
    """
    wide, wide_gradient = weight.detach().to(widened(weight.dtype)), gradient.to(widened(gradient.dtype))
    products = (wide * wide_gradient).movedim(dim, 0)
    return products.reshape(len(products), -1).sum(1)


def gates_of_norm(gain: Tensor, gain_gradient: Tensor, shift: Tensor, shift_gradient: Tensor) -> Tensor:
    """Gradient of the loss at a gate of one behind a batch norm: gain * its gradient + shift * its gradient, [channels]."""
    wide = widened(gain.dtype)
    return gain.detach().to(wide) * gain_gradient.to(wide) + shift.detach().to(wide) * shift_gradient.to(wide)


def with_momentum(former: Tensor, contribution: Tensor, momentum: float = MOMENTUM) -> Tensor:
    """The score at a pruning after the first: momentum * former score + (1 - momentum) * contribution of the period."""
    return momentum * former + (1 - momentum) * contribution


_Known = Callable[[str], tuple[Tensor, Tensor] | None]  # a parameter and its gradient, None where it has none


def gate_gradients(
    groups: Iterable[Group], model: nn.Module, norm_behind: Mapping[str, str], ids: Set[int]
) -> list[Tensor | None]:
    """Gradient of the loss at a gate of one on each unit of each group, [size] each; None where no consumer has a gradient.

    A gate stands behind the batch norm of each producer, or behind the producer where it has none, and gradients are
    summed over producers. The gates stand before the consumers, over which gradients are summed,

    - where a unit is several channels of a producer (a head of attention, the halves of a gated unit),
    - where the gradient at a producer's gate cannot be known: of a norm without a gain, or of frozen parameters,
    - where another norm follows before the consumers (behind an activation, pooling or a depthwise layer, or an instance
      norm): it divides a gate out again, so the gradient at a gate in front of it is 0 up to rounding. Any module with
      entries for channels may be one, such as a norm of somebody's own, except layers of torch. Of a norm without
      parameters and statistics, over single channels or positions, it is not known which channels it takes, and in a
      model with one all gates stand before the consumers.

    Args:
        groups: the groups.
        model: the model, with the gradients of a step.
        norm_behind: the batch norm that takes the output of a layer unchanged, by the layer's name.
        ids: ``id`` of every parameter whose gradients are those of the step.
    """

    @functools.cache
    def known(name: str) -> tuple[Tensor, Tensor] | None:
        tensor = model.get_parameter(name)
        return (tensor, tensor.grad) if tensor.grad is not None and id(tensor) in ids else None

    # once for each layer, which may read many groups (those of a concatenation)
    @functools.cache
    def before(parameter: str, dim: int) -> Tensor | None:
        pair = known(parameter)
        return None if pair is None else gates_of_slices(*pair, dim)

    hidden = any(hides_its_channels(module) for module in model.modules())

    def of_units(group: Group) -> Tensor | None:
        gates = [] if hidden else _behind_producers(group, model, norm_behind, known)
        gates = gates or [(g, c) for c in group.consumers if (g := before(c.parameter, c.dim)) is not None]
        found = [unit_scores(entries, member, group.size) for entries, member in gates]
        return torch.stack([f.to(found[0]) for f in found]).sum(0) if found else None

    return [of_units(group) for group in groups]


def _behind_producers(
    group: Group, model: nn.Module, norm_behind: Mapping[str, str], known: _Known
) -> list[tuple[Tensor, Member]]:
    """Gradients at the gates behind each producer, and the member whose slices they are of; none where one is not known."""
    if any(int((p.units >= 0).sum()) > group.size for p in group.producers):
        return []  # parts of a unit are multiplied with each other, and one gate on all of them is another thing
    if _may_be_normalized_again(group, model, norm_behind):
        return []
    found: dict[str, tuple[Tensor, Member] | None] = {}
    for producer in group.producers:
        norm = norm_behind.get(producer.module)
        if norm is None:
            found[producer.parameter] = _behind_layer(producer, model, known)
        elif norm not in found:  # of a norm that takes several producers the gradients are sums already
            found[norm] = _behind_norm(group, norm, model, known)
    return [] if None in found.values() else [gates for gates in found.values() if gates is not None]


def _may_be_normalized_again(group: Group, model: nn.Module, norm_behind: Mapping[str, str]) -> bool:
    """Whether the loss may not depend on the scale of a unit as its producers give it, or the norms right behind them."""
    makers = {p.module for p in group.producers}  # whose biases are entries for channels too
    others = {f.module for f in group.followers} - makers - {norm_behind.get(name) for name in makers}
    # of a module with any other class nobody knows what it does with its entries
    return not all(is_layer(model.get_submodule(name)) for name in others)


def _behind_norm(group: Group, norm: str, model: nn.Module, known: _Known) -> tuple[Tensor, Member] | None:
    member = next((f for f in group.followers if f.module == norm), None)
    if member is None or not model.get_submodule(norm).affine:
        return None
    gain, shift = known(f"{norm}.weight"), known(f"{norm}.bias")
    return None if gain is None or shift is None else (gates_of_norm(*gain, *shift), member)


def _behind_layer(producer: Member, model: nn.Module, known: _Known) -> tuple[Tensor, Member] | None:
    weight = known(producer.parameter)
    if weight is None:
        return None
    gates = gates_of_slices(*weight, producer.dim)
    name = producer.parameter.removesuffix("weight") + "bias"
    if getattr(model.get_submodule(producer.module), name.rpartition(".")[2], None) is None:
        return gates, producer
    bias = known(name)
    if bias is None:
        return None
    # a grouped transposed convolution has one slice for channels of all its groups, and a bias for each of them
    return gates + gates_of_slices(*bias).view(-1, len(gates)).sum(0), producer


@criterion("taylor_fo")
class GateTaylor(Criterion):
    """(gate * gradient of the loss at the gate)^2 of each optimizer step, its mean over the steps since the last pruning,
    and 0.9 of the former score (Molchanov, Mallya, Tyree, Frosio, Kautz: Importance Estimation for Neural Network Pruning.
    CVPR 2019).

    The gradient is that of the step's whole batch, over ranks and accumulation; the first pruning takes the mean as it is.
    Where the gates stand, :func:`gate_gradients` says.
    """

    needs_steps = True
    needs_norms = True

    def __init__(self) -> None:
        # by optimizer, since another one may be announced before this one steps: scores by window, not in aux yet
        self._fresh: dict[int, dict[str, Tensor]] = {}

    def begin(self, network: ScoredNetwork) -> None:
        names, saved = _windows(network), network.saved
        if saved is not None:
            sizes = dict(zip(names, (g.size for g in network.groups), strict=True))
            windows.refuse_lost_windows(saved, network.method, sizes)
            pruned = {int(optimizer) for optimizer in saved.progress["done"]}
            for name, optimizer in zip(names, network.optimizer_of, strict=True):
                if optimizer in pruned and f"former.{name}" not in saved.aux:
                    raise damaged(f"it has no former.{name}, which a run of {network.method} saves", saved.path)
        for name, group in zip(names, network.groups, strict=True):
            windows.begin_window(network.aux, name, group.size, network.device_of(group))

    def before_step(self, network: ScoredNetwork, step: Step, last: bool) -> None:
        self._fresh[step.index] = {}
        if last:
            return
        own = [n for n, optimizer in enumerate(network.optimizer_of) if optimizer == step.index]
        groups, names = [network.groups[n] for n in own], _windows(network)
        found = gate_gradients(groups, network.model, network.norm_behind, parameter_ids(step.optimizer))
        self._fresh[step.index] = {names[n]: g.square() for n, g in zip(own, found, strict=True) if g is not None}

    def after_step(self, network: ScoredNetwork, step: Step) -> None:
        for name, scores in self._fresh.pop(step.index, {}).items():
            # of weights that are pruned alone the step knows whether gradients are finite, and gains are none of them
            finite = torch.as_tensor(step.finite_flag, device=scores.device) & scores.isfinite().all()
            windows.add_to_window(network.aux, name, scores, finite)

    def scores(self, network: ScoredNetwork, number: int) -> list[Tensor]:
        return [_score(network, name) for name in _windows(network)]

    def after_update(self, network: ScoredNetwork, groups: Sequence[int]) -> None:
        names = _windows(network)
        for group in groups:
            # what is pruned counts nothing from here on
            network.aux[f"former.{names[group]}"] = _score(network, names[group]) * network.live[group]
        windows.reset_windows(network.aux, [names[g] for g in groups], keep_means=False)


def _windows(network: ScoredNetwork) -> list[str]:
    return [windows.window_of(index, group) for index, group in enumerate(network.groups)]


def _score(network: ScoredNetwork, window: str) -> Tensor:
    contribution = windows.mean_of_window(network.aux, window)
    former = network.aux.get(f"former.{window}")
    if former is None:
        return contribution
    # no step of its optimizer since the last pruning, as in a choice that another optimizer brings: the score stays
    counted = network.aux[f"steps.{window}"] > 0
    return torch.where(counted, with_momentum(former, contribution), former)
