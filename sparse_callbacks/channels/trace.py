"""Which channels of which layers depend on each other: torch-pruning's trace of a model, walked channel by channel.

torch-pruning (extra ``channels``) is asked for three things: the nodes of one traced forward pass, the dependencies between them, and
how an index moves along a dependency (flatten, concatenation, split). The walk is ours: it moves single channels, sees where two
of them meet, knows which operations it may pass, and ends in time.
"""

import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from sparse_callbacks.channels.channel_padding import channel_padding, map_through
from sparse_callbacks.channels.obstacles import FOLLOWERS, LAYERS, constants, obstacle
from sparse_callbacks.core.inspection import extra, map_tensors, run, tensors_in, training


@dataclass
class Place:
    """One side of one module (or a parameter of its own) that the walk has reached, and which roots arrive at which of its channels;
    or a split, without a name, whose parts must stay equally large."""

    name: str
    kind: str
    """Kind of node, as torch-pruning calls it."""
    side: str
    """``"out"``, ``"in"``; followers have the same channels on both sides: ``"both"``."""
    roots: dict[int, set[int]] = field(default_factory=dict)
    """Channels of the root by the local index that they arrive at."""


@dataclass
class Walk:
    """Everything that shares channels with the outputs of one layer."""

    places: list[Place]
    obstacle: str = ""
    """Why these channels cannot be removed."""


class _Channel(NamedTuple):
    """A channel where it is, and at the root; under the names that torch-pruning's index mappings read."""

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
        branches: names of modules that are in train mode in a second pass, whose operations are traced with those of the first.
        begin: what the monotonic clock told when the time began to run; None: now.

    Raises:
        ImportError: torch-pruning is not installed.
        TimeoutError: the limit is exceeded.
        ValueError: the model cannot be traced.
    """

    def __init__(
        self, model: nn.Module, example_input: Any, seconds: float, branches: Sequence[str] = (), begin: float | None = None
    ) -> None:
        pruning = extra("torch_pruning", "channels")
        self.begin = time.monotonic() if begin is None else begin
        self.seconds, self._deadline = seconds, self.begin + seconds
        self.graph = self._watched(pruning.DependencyGraph)
        self._names: dict[Any, str] = {m: n for n, m in model.named_modules()} | {p: n for n, p in model.named_parameters()}
        in_training = [model.get_submodule(n) for n in branches]

        def passes(module: nn.Module, example: Any) -> list[Any]:
            found = [run(module, example)]
            if in_training:
                with training(in_training):
                    found.append(run(module, example))
            return found

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.graph.build_dependency(
                    model, map_tensors(_marked, example_input), forward_fn=passes, output_transform=_outputs, verbose=False
                )
        except TimeoutError:
            raise
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be traced ({type(error).__name__}: {error}). Give an example_input that the model takes: "
                "a tensor, a tuple of positional or a mapping of named arguments; its output must depend on the parameters."
            ) from error
        self.nodes = {self._names[m]: node for m, node in self.graph.module2node.items() if m in self._names}

    def _watched(self, base: Any) -> Any:
        """A dependency graph of torch-pruning that keeps to the time limit, and takes ``chunk`` for what it is."""
        check = self.check_time

        class Graph(base):  # type: ignore[misc]  # a class of an optional dependency
            def get_pruner_of_module(self, module: Any) -> Any:  # asked at every step of its recursions
                check()
                return super().get_pruner_of_module(module)

            def _build_dependency(self, module2node: dict[Any, Any]) -> None:
                for node in module2node.values():
                    if hasattr(node.grad_fn, "_saved_self_sym_sizes"):
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
        if time.monotonic() > self._deadline:
            raise TimeoutError(
                f"The search for channel groups took more than {self.seconds:g} s. Give a smaller example_input, a longer seconds=, or "
                "leave the model's channels alone."
            )

    def layers(self) -> list[str]:
        """Names of the convolutions and linear layers that the trace found, in the model's order."""
        found = {n for n, node in self.nodes.items() if node.type.name in LAYERS}
        return [n for n in self._names.values() if n in found]

    def outputs_of(self, name: str) -> int:
        module = self.nodes[name].module
        return int(module.out_channels if hasattr(module, "out_channels") else module.out_features)

    def walk(self, name: str, channels: Sequence[int]) -> Walk:
        """Follow ``channels`` of the outputs of layer ``name`` to everywhere that they must be removed from with them."""
        start = self.nodes[name]
        begin = self.graph.get_pruner_of_module(start.module).prune_out_channels
        seen: dict[tuple[Any, Any], set[tuple[int, int]]] = {}
        queue = deque([(start, begin, [_Channel(i, i) for i in channels])])
        while queue:
            self.check_time()
            node, handler, arrivals = queue.popleft()
            known = seen.get((node, handler), set())
            fresh = [i for i in arrivals if (i.idx, i.root_idx) not in known]
            if not fresh:  # also where a concatenation hands on none of the channels
                continue
            fresh += self._tied(node, handler, fresh, known)
            seen.setdefault((node, handler), set()).update((i.idx, i.root_idx) for i in fresh)
            if not obstacle(node, self._name_of(node)):
                queue.extend((d.target, d.handler, _moved(d, fresh)) for d in node.dependencies if d.is_triggered_by(handler))
        return self._described(seen)

    def _tied(self, node: Any, handler: Any, fresh: Sequence[Any], known: set[tuple[int, int]]) -> list[Any]:
        """Channels that have the same places as ``fresh`` ones in other groups of a convolution, and have not been reached: they go
        together, whatever layers they are from."""
        groups = getattr(node.module, "groups", 1) if node.type.name == "CONV" else 1
        if groups == 1 or not fresh:
            return []
        module = node.module
        size = module.out_channels if self.graph.is_out_channel_pruning_fn(handler) else module.in_channels
        reached = {idx for idx, _ in known} | {i.idx for i in fresh}
        places = {i.idx % (size // groups): i.root_idx for i in fresh}
        return [_Channel(i, root) for place, root in places.items() for i in range(place, size, size // groups) if i not in reached]

    def _name_of(self, node: Any) -> str:
        return self._names.get(node.module, "")

    def _described(self, seen: Mapping[tuple[Any, Any], set[tuple[int, int]]]) -> Walk:
        walk = Walk([])
        for (node, handler), pairs in seen.items():
            walk.obstacle = walk.obstacle or obstacle(node, self._name_of(node)) or constants(node, pairs)
            if node.type.name == "SPLIT" and (sizes := node.module.split_sizes):
                walk.places.append(_parts(pairs, sizes[0]))  # chunk() makes equal parts again, so they must lose equally many
            if node.type.name not in LAYERS + FOLLOWERS:
                continue
            out = self.graph.is_out_channel_pruning_fn(handler)
            side = "both" if node.type.name in FOLLOWERS else "out" if out else "in"
            place = Place(self._name_of(node), node.type.name, side)
            for local, root in pairs:
                place.roots.setdefault(local, set()).add(root)
            walk.places.append(place)
        return walk


def _parts(pairs: set[tuple[int, int]], size: int) -> Place:
    """The roots that arrive at the same place of the parts of a split, each of ``size`` channels."""
    place = Place("", "SPLIT", "")
    for local, root in pairs:
        place.roots.setdefault(local % size, set()).add(root)
    return place


def _moved(dependency: Any, indices: list[Any]) -> list[Any]:
    for mapping in dependency.index_mapping:
        indices = indices if mapping is None else mapping(indices)
    return indices


def _marked(tensor: Tensor) -> Tensor:
    """The same values with a backward node that has no inputs, where gradients can flow at all."""
    return tensor.detach().clone().requires_grad_().clone() if tensor.is_floating_point() else tensor


def _outputs(nest: Any) -> list[Tensor]:
    """The network's outputs behind one more operation, so that none of them is the output of a layer."""
    return [t * 1 for t in tensors_in(nest) if t.requires_grad]
