"""What a run of a method begins with: saved masks, those of its last run, or initial ones."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_callbacks.core.awaited import for_targets, names_awaited, with_awaited
from sparse_callbacks.core.checkpoint import refuse_foreign_weights, refuse_other_model
from sparse_callbacks.core.found_shares import shares_to_keep
from sparse_callbacks.core.fresh_weights import refuse_rescaling
from sparse_callbacks.core.gradient_mask import refuse_lost_gradients
from sparse_callbacks.core.live.live_runs import layers_of_run, refuse_foreign_places, same_places
from sparse_callbacks.core.local_parts import local_parameter
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.optimizer_needs import refuse_optimizers
from sparse_callbacks.core.optimizers import Ownership
from sparse_callbacks.core.planned_targets import planned_targets
from sparse_callbacks.core.progress import Progress
from sparse_callbacks.core.restored import aux_on_devices, refuse_other_places
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.shards import cut
from sparse_callbacks.core.state_claims import PLAN_CHANGED, planned_otherwise, refuse_impossible
from sparse_callbacks.core.thawed import first_masks
from sparse_callbacks.core.topology import EverActive
from sparse_callbacks.core.weights import SparseWeights, whole


class RunBeginning:
    """What a run begins with. To make one is to refuse what cannot be: the method changes in :meth:`take_effect`.

    With ``method.saved`` its masks go on; otherwise those of the last run with the same model, and otherwise initial
    ones are made.

    Args:
        method: the method of the run.
        model: the module whose ``named_parameters`` the masks go by.
        entries: all parameters; those without a reason become sparse.
        optimizers: the optimizers of the run.
        admits: the run goes on from its own state with layers that it has awaited; see :meth:`Engine.take_up`.

    Raises:
        ValueError: the masks do not belong to the model, or an optimizer cannot be used with the method.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        entries: Sequence[Entry],
        optimizers: Sequence[Optimizer],
        admits: bool = False,
    ) -> None:
        refuse_lost_gradients(method)
        self._method, self._saved = method, method.saved
        masked: Sequence[str] = ()
        awaited: Sequence[str] = ()
        if self._saved is not None:
            masked, awaited = self._saved.names, self._saved.awaited or ()
        elif method.attachment.model is model:  # its second fit: what is frozen for it begins anew where it is thawed
            awaited = names_awaited(method.entries)
        entries = with_awaited(method, entries, masked, awaited, admits)
        self._entries = list(method.further_members(model, entries))
        parameters = dict(model.named_parameters())
        self._sparse = {e.name: e for e in self._entries if not e.reason}
        self._params = {name: local_parameter(parameters[name]) for name in self._sparse}
        self._layers = layers_of_run(method, model, self._entries, optimizers)
        self._kept = self._masks_of_last_run(model)
        self._kept_layers = self._layers_of_last_run(model)
        if self._saved is not None:
            model_params = {n: parameters[n] for n in self._sparse if not admits or n in masked}
            dense = {e.name: e.reason for e in self._entries if e.reason}
            refuse_other_model(self._saved, model_params, self._layers, dense)
        sharing = for_targets(entries)
        self._targets = planned_targets(method, model, sharing, self._saved, together=True)
        self._allocated = shares_to_keep(method, sharing)
        if self._saved is not None:
            self._saved = planned_otherwise(self._saved, entries)
            if not admits:  # otherwise it is the run's own state
                planned = method.parameter_zeros(self._entries, self._targets)
                refuse_impossible(method, self._saved, model, planned, len(optimizers))
                refuse_other_places(self._saved, self._layers)
            self._dense: Mapping[str, Tensor] = cut(self._saved.dense, self._params)
        else:
            refuse_foreign_weights(self._kept, self._params, everywhere=True)
            self._dense = {n: method.weights.dense_values(n) for n in method.weights.copied if n in self._kept}
        if self.is_new:
            refuse_rescaling(method, model, self._params)
        self.owners = Ownership(optimizers, self._params)
        """Which optimizer steps which sparse parameter."""
        refuse_optimizers(method, self.owners)

    def _masks_of_last_run(self, model: nn.Module) -> dict[str, Tensor]:
        """Masks that go on where a second fit of the same model begins without a checkpoint."""
        if self._method.attachment.model is not model:
            return {}
        params = self._params
        weights = self._method.weights
        found = {n: whole(m) for n, m in weights.held_masks.items() if n in params and m.shape == params[n].shape}
        # a layer that was exchanged in the last run and is dense now goes on under a mask
        dense = [n for n in weights.layers_stored if n in params and n not in self._layers]
        return found | {n: weights.masks[n] for n in dense if weights.entries[n].full_shape == params[n].shape}

    def _layers_of_last_run(self, model: nn.Module) -> set[str]:
        """Names of the exchanged layers that go on where a second fit of the same model begins without a checkpoint.

        Raises:
            ValueError: a layer has other places than the last run left in it.
        """
        weights = self._method.weights
        if self._saved is not None or self._method.attachment.model is not model:
            return set()
        before = weights.layers_stored
        refuse_foreign_places(weights, [n for n, layer in self._layers.items() if before.get(n) is layer])
        # other objects where the model was made dense in between
        return {n for n, layer in self._layers.items() if n in before and same_places(layer, before[n])}

    @property
    def is_new(self) -> bool:
        """No run goes on: masks, counters and tensors are made anew."""
        return self._saved is None and not self._kept and not self._kept_layers

    def take_effect(self) -> None:
        """Give the method its parameters, masks, counters and tensors. No weight changes."""
        method, params = self._method, self._params
        earlier = method.params.keys()
        method.entries, method.targets, method.owners = self._entries, self._targets, self.owners
        # initial masks are made from the parameters; exchanged layers have theirs
        method.weights = SparseWeights({n: p for n, p in params.items() if n not in self._layers}, self._sparse, {})
        masks = cut(self._begin_masks(earlier), params)
        method.aux = cut({**method.aux, **aux_on_devices(self._allocated, params)}, params)
        method.attachment.shares_are_taken()
        method.progress.begin(len(self.owners.optimizers))
        method.weights = SparseWeights(params, self._sparse, masks, self._layers)
        if method.keeps_dense:
            before = self._kept if self._saved is None else self._saved.masks
            method.start_copies(self._dense, new=params.keys() - before.keys())
        if method.explores:
            EverActive(method.aux, method.weights).add(params)

    def _begin_masks(self, earlier: Iterable[str]) -> Mapping[str, Tensor]:
        """The masks that the run begins with; counters and tensors of the method are restored or go on with them.

        Args:
            earlier: the names of the sparse parameters of the last run.
        """
        method, saved, kept, params = self._method, self._saved, self._kept, self._params
        if saved is not None:
            method.progress = Progress.restored(method.first_update, saved.progress)
            method.aux = aux_on_devices(saved.aux, params)
            return {**saved.masks, **first_masks(method, [n for n in params if n not in saved.names])}
        if self.is_new:
            return method.initial_masks() if method.params else {}
        # layers that were added since the last run start like in a first one
        gone = {*params, *earlier} - kept.keys() - self._kept_layers
        went_on = {k: t for k, t in method.aux.items() if k.partition("/")[2] not in gone}
        method.aux = aux_on_devices(went_on, params)
        if gone:  # the targets of other layers may be others, and these masks keep their counts
            method.aux[PLAN_CHANGED] = torch.tensor(True)
        return kept if len(kept) == len(method.params) else {**method.initial_masks(), **kept}
