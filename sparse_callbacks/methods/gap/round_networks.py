"""Networks of a round of workers: the one that they start from, and what each of them has trained."""

from collections.abc import Mapping, MutableMapping, Sequence

from torch import Tensor, nn

from sparse_callbacks.core import distributed
from sparse_callbacks.methods.gap.combination import names_by_partition, tensor_owners

_Aux = MutableMapping[str, Tensor]


class RoundNetworks:
    """Keeps, combines and loads the networks of a round.

    On several ranks each holds the network of its worker. In one process the workers train one after another, and
    networks wait in ``aux`` until they are needed: in ``aux``, because a checkpoint within a round must hold them.

    Args:
        model: the model that trains.
        aux: tensors of the method, which a checkpoint holds.
        together: whether the workers train at once, one on each rank.
    """

    def __init__(self, model: nn.Module, aux: _Aux, together: bool) -> None:
        self._model, self._aux, self._together = model, aux, together

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks that the round began with, all partitions pruned."""
        return kept_tensors(self._aux, "sparse")

    def owners(self, partitions: Sequence[Sequence[str]]) -> dict[str, int]:
        """The worker that each tensor of the model comes from; see :func:`tensor_owners`."""
        tensors = tensors_of(self._model)
        return tensor_owners(tensors, names_by_partition(tensors, partitions))

    def keep_start(self, masks: Mapping[str, Tensor]) -> None:
        """The model with its ``masks`` is what the workers of the coming round start from."""
        keep_tensors(self._aux, "sparse", masks)
        if not self._together:
            drop_tensors(self._aux, "gathered")
            keep_tensors(self._aux, "start", tensors_of(self._model))

    def load_start(self) -> None:
        """Load what the workers of the round start from, in place of the network of the worker before."""
        if not self._together:  # otherwise every rank still has it
            load_tensors(self._model, kept_tensors(self._aux, "start"))

    def gather(self, worker: int, owners: Mapping[str, int]) -> None:
        """A worker is done: keep the tensors that come from it."""
        # only these, so that all workers of a round together take one copy of the network
        if not self._together:
            own = {k: t for k, t in tensors_of(self._model).items() if owners[k] == worker}
            keep_tensors(self._aux, "gathered", own)

    def load_combined(self, owners: Mapping[str, int]) -> None:
        """All workers are done: load every tensor from its owner."""
        if self._together:
            load_tensors(self._model, distributed.from_owners(tensors_of(self._model), owners))
        else:
            load_tensors(self._model, kept_tensors(self._aux, "gathered"))

    def forget(self) -> None:
        """No round follows."""
        drop_tensors(self._aux, "sparse")
        drop_tensors(self._aux, "start")


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's state dict, without what else a module may put there."""
    return {k: t.detach() for k, t in model.state_dict().items() if isinstance(t, Tensor)}


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` into a model, and leave everything else as it is."""
    # with the rest of the state dict, so that the load can be strict: a name that the model lacks is an error
    model.load_state_dict({**model.state_dict(), **tensors})


def keep_tensors(aux: _Aux, kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep copies of ``tensors`` in ``aux`` under ``kind``: the network that they are of trains on."""
    # the tensor's name comes last, as in every key of aux: a resume finds its device by it
    for name, tensor in tensors.items():
        aux[f"{kind}/{name}"] = tensor.detach().clone()


def kept_tensors(aux: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """What ``aux`` keeps under ``kind``, by name."""
    return {k.removeprefix(f"{kind}/"): t for k, t in aux.items() if k.startswith(f"{kind}/")}


def drop_tensors(aux: _Aux, kind: str) -> None:
    """Keep nothing under ``kind`` any longer."""
    for key in [k for k in aux if k.startswith(f"{kind}/")]:
        del aux[key]
