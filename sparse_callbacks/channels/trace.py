"""Which channels of which layers depend on each other: torch-pruning's trace, channel by channel.

torch-pruning (extra ``channels``) gives three things: the nodes of one traced forward pass, the dependencies between
them, and how an index moves along a dependency (flattening, concatenation, split). The walk is ours: it moves single
channels, finds where two of them meet, knows which operations it may pass, and ends in time.
"""

import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from sparse_callbacks.channels.channel_padding import channel_padding, map_through
from sparse_callbacks.channels.obstacles import FOLLOWERS, LAYERS, why_not_passed, why_padding_stays
from sparse_callbacks.core.error_text import with_class
from sparse_callbacks.core.inspection import extra, map_tensors, run, tensors_in, training


@dataclass
class Place:
    """One side of a module, or a parameter of its own, that the walk has reached.

    It may also be a split, without a name, whose parts must stay equally large.

    Attributes:
        name: name of the module or parameter.
        kind: kind of node, as torch-pruning calls it.
        side: ``"out"`` or ``"in"``; ``"both"`` of a follower, which has the same channels on both sides.
        roots: by the local index of a channel, the channels of the root layer that arrive there.
    """

    name: str
    kind: str
    side: str
    roots: dict[int, set[int]] = field(default_factory=dict)


@dataclass
class Walk:
    """Everything that shares channels with the outputs of one layer.

    Attributes:
        places: where they arrive.
        reason: why these channels cannot be removed; empty where they can.
    """

    places: list[Place]
    reason: str = ""


class _Channel(NamedTuple):
    """A channel: its index here, and at the root layer. torch-pruning's index mappings read these names."""

    idx: int
    root_idx: int


class _Sized:
    """A backward node under the attribute names of older torch versions, which torch-pruning looks for."""

    def __init__(self, node: Any) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, "_saved_self_sym_sizes" if name == "_saved_self_sizes" else name)


class Trace:
    """One traced forward pass of a model.

    Args:
        model: in the state of :func:`~sparse_callbacks.core.inspection.traceable`.
        example_input: see :func:`~sparse_callbacks.core.inspection.run`.
        seconds: time limit of tracing and of all walks together.
        branches: names of modules that are in train mode in a second pass, whose operations are traced together with
            those of the first pass.
        begin: reading of the monotonic clock from which the time counts; None: now.

    Raises:
        ImportError: torch-pruning is not installed.
        TimeoutError: the limit is exceeded.
        ValueError: the model cannot be traced.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        seconds: float,
        branches: Sequence[str] = (),
        begin: float | None = None,
    ) -> None:
        pruning = extra("torch_pruning", "channels")
        # not the time of day, which may be set while a search runs
        self.begin = time.monotonic() if begin is None else begin
        self.seconds, self._deadline = seconds, self.begin + seconds
        self.graph = self._watched(pruning.DependencyGraph)
        self._names: dict[Any, str] = {m: n for n, m in model.named_modules()}
        # parameters too: a node may stand for one that belongs to no layer, such as a scale
        self._names |= {p: n for n, p in model.named_parameters()}
        self._build(model, example_input, [model.get_submodule(n) for n in branches])
        self.nodes = {self._names[m]: node for m, node in self.graph.module2node.items() if m in self._names}

    def _build(self, model: nn.Module, example_input: Any, in_training: Sequence[nn.Module]) -> None:
        """Trace the forward pass, and once more with these modules in train mode if there are any."""

        def passes(module: nn.Module, example: Any) -> list[Any]:
            found = [run(module, example)]
            if in_training:
                with training(in_training):
                    found.append(run(module, example))
            return found

        try:
            with warnings.catch_warnings():
                # torch-pruning warns of operations that it does not know, for which the walk gives a reason
                warnings.simplefilter("ignore")
                inputs = map_tensors(_marked, example_input)
                self.graph.build_dependency(
                    model, inputs, forward_fn=passes, output_transform=_through_one_more_operation, verbose=False
                )
        except TimeoutError:  # of check_time, which says what to do
            raise
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be traced ({with_class(error)}). "
                "Give an example_input that the model takes: a tensor, a tuple of positional or a mapping of named "
                "arguments; its output must depend on the parameters."
            ) from error

    def _watched(self, base: Any) -> Any:
        """A dependency graph of torch-pruning that keeps to the time limit, and understands ``chunk`` and padding.

        torch-pruning has no place to put these in, so methods that it calls while it builds the graph are overridden.
        """
        check = self.check_time

        class Graph(base):  # type: ignore[misc]  # a class of an optional dependency
            def get_pruner_of_module(self, module: Any) -> Any:  # asked at every step of its recursions
                check()
                return super().get_pruner_of_module(module)

            def _build_dependency(self, module2node: dict[Any, Any]) -> None:
                for node in module2node.values():
                    if hasattr(node.grad_fn, "_saved_self_sym_sizes"):  # a chunk, in newer versions of torch
                        node.grad_fn = _Sized(node.grad_fn)
                super()._build_dependency(module2node)
                map_through(module2node.values())

            def get_out_channels(self, module_or_node: Any) -> Any:
                padding = channel_padding(module_or_node) if hasattr(module_or_node, "grad_fn") else None
                return super().get_out_channels(module_or_node) if padding is None else padding.channels

            def get_in_channels(self, module_or_node: Any) -> Any:
                padding = channel_padding(module_or_node) if hasattr(module_or_node, "grad_fn") else None
                return super().get_in_channels(module_or_node) if padding is None else padding.inside

        return Graph()

    def check_time(self) -> None:
        """Raise TimeoutError once the time limit is exceeded."""
        if time.monotonic() > self._deadline:
            raise TimeoutError(
                f"The search for channel groups took more than {float(self.seconds):g} s. Give a smaller example_input, a "
                "longer seconds=, or leave the model's channels alone."
            )

    def layers(self) -> list[str]:
        """Names of the convolutions and linear layers that the trace found, in the model's order."""
        found = {n for n, node in self.nodes.items() if node.type.name in LAYERS}
        return [n for n in self._names.values() if n in found]

    def outputs_of(self, name: str) -> int:
        """Number of outputs of layer ``name``."""
        module = self.nodes[name].module
        return int(module.out_channels if hasattr(module, "out_channels") else module.out_features)

    def walk(self, name: str, channels: Sequence[int]) -> Walk:
        """Follow ``channels`` of the outputs of layer ``name`` to every place that must lose them too.

        A place is a node together with the side that loses channels, which torch-pruning calls a handler. Channels that
        arrive at a place again are dropped, so the walk ends although the graph has cycles.
        """
        start = self.nodes[name]
        begin = self.graph.get_pruner_of_module(start.module).prune_out_channels
        seen: dict[tuple[Any, Any], set[tuple[int, int]]] = {}
        queue = deque([(start, begin, [_Channel(i, i) for i in channels])])
        while queue:  # nearest places first, so that the reason that is given is the nearest one
            self.check_time()
            node, handler, arriving = queue.popleft()
            known = seen.get((node, handler), set())
            # pairs and not places alone, as channels of several roots may meet at one place
            fresh = [i for i in arriving if (i.idx, i.root_idx) not in known]
            if not fresh:  # also where a concatenation hands on none of the channels
                continue
            fresh += self._tied(node, handler, fresh, known)
            seen.setdefault((node, handler), set()).update((i.idx, i.root_idx) for i in fresh)
            if why_not_passed(node, self._name_of(node)):
                continue  # what lies on the other side needs no walk, as the whole group stays
            ways = [d for d in node.dependencies if d.is_triggered_by(handler)]
            queue.extend((d.target, d.handler, _moved(d, fresh)) for d in ways)
        return self._described(seen)

    def _tied(self, node: Any, handler: Any, fresh: Sequence[Any], known: set[tuple[int, int]]) -> list[Any]:
        """Channels that go with the fresh ones because they have the same places in other groups of a convolution.

        A grouped convolution stores one weight for the same place in all groups, so these go together, whatever layers
        they come from. Those that have been reached before are left out.
        """
        groups = getattr(node.module, "groups", 1) if node.type.name == "CONV" else 1
        if groups == 1 or not fresh:
            return []
        module = node.module
        is_output = self.graph.is_out_channel_pruning_fn(handler)
        span = (module.out_channels if is_output else module.in_channels) // groups
        reached = {idx for idx, _ in known} | {i.idx for i in fresh}
        roots = {i.idx % span: i.root_idx for i in fresh}
        return [
            _Channel(place + group * span, root)
            for place, root in roots.items()
            for group in range(groups)
            if place + group * span not in reached
        ]

    def _name_of(self, node: Any) -> str:
        return self._names.get(node.module, "")

    def _described(self, seen: Mapping[tuple[Any, Any], set[tuple[int, int]]]) -> Walk:
        """What a walk has seen: for each node and side the pairs of a channel's local index and its root."""
        walk = Walk([])
        for (node, handler), pairs in seen.items():
            # nodes are in the order in which the walk met them, so the first reason is the nearest
            if not walk.reason:
                walk.reason = why_not_passed(node, self._name_of(node)) or why_padding_stays(node, pairs)
            kind = node.type.name
            if kind == "SPLIT" and node.module.split_sizes:
                # chunk() makes equal parts of what is left, so they must lose the same channels
                walk.places.append(_parts(pairs, node.module.split_sizes[0]))
            if kind not in LAYERS + FOLLOWERS:
                continue
            side = "out" if self.graph.is_out_channel_pruning_fn(handler) else "in"
            place = Place(self._name_of(node), kind, "both" if kind in FOLLOWERS else side)
            for local, root in pairs:
                place.roots.setdefault(local, set()).add(root)
            walk.places.append(place)
        return walk


def _parts(pairs: set[tuple[int, int]], size: int) -> Place:
    """The roots that arrive at the same place of the parts of a split, each of ``size`` channels."""
    place = Place("", "SPLIT", "")
    for local, root in pairs:
        # parts begin at multiples of their size
        place.roots.setdefault(local % size, set()).add(root)
    return place


def _moved(dependency: Any, indices: list[Any]) -> list[Any]:
    """The channels after a dependency, which has up to two mappings of indices."""
    for mapping in dependency.index_mapping:
        indices = indices if mapping is None else mapping(indices)
    return indices


def _marked(tensor: Tensor) -> Tensor:
    """The same values behind a clone without inputs, by which the walk knows an input of the network."""
    return tensor.detach().clone().requires_grad_().clone() if tensor.is_floating_point() else tensor


def _through_one_more_operation(nest: Any) -> list[Tensor]:
    """The network's outputs after one more operation, so that none of them is itself the output of a layer."""
    # integers, such as predicted labels, have no gradient and so no place in the trace
    return [t * 1 for t in tensors_in(nest) if t.requires_grad]
