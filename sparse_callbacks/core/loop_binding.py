"""Binds the engine of a run to the model and the optimizers of a hand-written loop."""

from collections.abc import Iterable, Mapping, Sequence
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from sparse_callbacks.core import distributed
from sparse_callbacks.core import optimizers as torch_optimizers
from sparse_callbacks.core.awaited import names_awaited
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.engine import Engine
from sparse_callbacks.core.host import Host
from sparse_callbacks.core.loop_optimizers import LoopOptimizers
from sparse_callbacks.core.neighbours import refuse_neighbours
from sparse_callbacks.core.selection import Entry, select

# Every run that goes on, by model: two methods may not claim the same parameter.
_bindings_of: WeakKeyDictionary[nn.Module, WeakSet["LoopBinding"]] = WeakKeyDictionary()


class LoopBinding:
    """The hold of a run on the sparse parameters of its model; it is renewed where the model was moved or converted.

    Args:
        engine: the engine of the run.
        model: the user's own module, without wrappers.
        optimizers: those of the loop.
        host: the loop, for the method.
        clips: whether the loop gave a function that clips gradients.
    """

    def __init__(self, engine: Engine, model: nn.Module, optimizers: LoopOptimizers, host: Host, clips: bool) -> None:
        self.engine, self.model, self.optimizers = engine, model, optimizers
        self._host, self._clips = host, clips
        self._placed: dict[str, tuple[torch.device, torch.dtype]] = {}
        self._awaited: list[nn.Parameter] = []

    def entries(self) -> list[Entry]:
        """Every parameter of the model, with the reason why it stays dense."""
        method = self.engine.method
        return select(self.model, method.include, method.exclude, method.keep_dense, self.optimizers.trained)

    def refuse_shared(self, names: Iterable[str]) -> None:
        """Refuse parameters that another run of the model claims, and a run that cannot be beside another one.

        Args:
            names: the names of the parameters that become sparse.

        Raises:
            ValueError: another run that is not closed has one of them, or excludes this one.
        """
        mine, method = set(names), self.engine.method
        others = [b.engine.method for b in _bindings_of.get(self.model, ()) if b is not self]
        for other in others:
            if both := sorted(mine & other.params.keys()):
                raise ValueError(
                    f"{type(other).__name__} and {type(method).__name__} both claim {', '.join(both)}. Give "
                    "each its own layers with include= or exclude=, or close() the run that is over."
                )
        refuse_neighbours(method, others)

    def bind(self, entries: Sequence[Entry]) -> None:
        """Let the engine take hold of the parameters; no weight changes."""
        optimizers = self.optimizers
        self.engine.bind(self.model, entries, optimizers.steppers, self._reads, self._host, optimizers.two_pass)
        self._note_places()
        self._share_dense_values()

    @property
    def _reads(self) -> list[bool]:
        """For each optimizer, whether anybody reads gradients between backward and its step."""
        # masked before the step only where somebody reads gradients in it; otherwise masking the weights is enough
        return [self._clips or not torch_optimizers.is_elementwise(o) for o in self.optimizers.given]

    def take_up(self) -> bool:
        """Let layers that have begun to be trained become sparse, other than those of other runs.

        Returns:
            Whether there are any.
        """
        others = [b.engine.method for b in _bindings_of.get(self.model, ()) if b is not self]
        trained = self.optimizers.trained - {id(p) for method in others for p in method.params.values()}
        optimizers = self.optimizers
        optimizers.note_new_groups()
        found = self.engine.take_up(trained, optimizers.steppers, self._reads, optimizers.two_pass)
        self._note_places()
        return bool(found)

    def who_is_trained(self) -> tuple[list[int], list[bool]]:
        """What shows that another parameter may be trained than before: sizes of parameter groups, and which of the
        parameters that the run awaits are frozen."""
        sizes = [len(group["params"]) for o in self.optimizers.steppers for group in o.param_groups]
        return sizes, [p.requires_grad for p in self._awaited]

    @torch.no_grad()
    def _share_dense_values(self) -> None:
        """Before DistributedDataParallel wraps the model each process may have weights of its own, which it overwrites;
        of dense copies it does not know."""
        weights = self.engine.method.weights
        if distributed.world_size() > 1:
            mine = {name: weights.dense_values(name) for name in weights.copied}
            for name, value in distributed.from_owners(mine, dict.fromkeys(mine, 0)).items():
                mine[name].copy_(value)

    def claim(self) -> None:
        """The run has begun: other runs may not have its parameters."""
        _bindings_of.setdefault(self.model, WeakSet()).add(self)

    def release(self) -> None:
        """The run is over, or was refused."""
        self.engine.unbind()
        _bindings_of.get(self.model, WeakSet()).discard(self)

    @property
    def is_current(self) -> bool:
        """The parameters are where they were, in the types that they had, when they were bound."""
        return self._places() == self._placed

    def _note_places(self) -> None:
        awaited = names_awaited(self.engine.method.entries)
        self._placed = self._places()
        self._awaited = [self.model.get_parameter(name) for name in awaited]

    def _places(self) -> dict[str, tuple[torch.device, torch.dtype]]:
        return {name: (p.device, p.dtype) for name, p in self.engine.method.params.items()}

    def renew(self, entries: Sequence[Entry]) -> None:
        """Go on where the parameters are now."""
        engine, method = self.engine, self.engine.method
        skipped, restart_wanted = engine.skipped, engine.restart_wanted
        method.saved = SavedRun.of(engine.state(), "of this run itself")
        engine.unbind()
        self.bind(entries)
        engine.skipped, engine.restart_wanted = skipped, restart_wanted
        engine.write()
        engine.begin_window()
        method.saved = None
        method.attachment.in_training = True


class ValuesBeforeMasks:
    """Values of sparse parameters before the masks of a run have cut them, for another state that is loaded into it.

    Args:
        values: the values by name of the parameter; none for a run to which no other state can be loaded.
        params: the parameters as they are now, with masks written.
    """

    def __init__(self, values: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
        # torch counts the writes to a tensor
        self._kept = {name: (value, params[name]._version) for name, value in values.items()}

    def __bool__(self) -> bool:
        return bool(self._kept)

    def drop(self) -> None:
        """A step was taken: no other state can be loaded now."""
        self._kept = {}

    def untouched(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values of those parameters that nobody has written since."""
        return {name: value for name, (value, version) in self._kept.items() if params[name]._version == version}
