"""Which parameters become sparse, which stay dense, and why."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear

KeepDense = Literal["first", "last", "both"]

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
# How many equal matrices torch stacks in each weight of these modules, one for each gate.
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1, "LSTMCell": 4, "GRUCell": 3, "RNNCell": 1}
NOT_TRAINED = ("frozen (requires_grad=False)", "in no optimizer")
_EMBEDDING = "embedding: sparse only where include= names it"
_NO_CANDIDATE = "none: the model has no supported layer"
_REPARAMETRISED = "reparametrised: not a plain weight"
# What torch.nn.utils' prune, weight_norm and spectral_norm append to the name of a weight that they compute from others.
_SUFFIXES = ("_orig", "_g", "_v")


@dataclass(frozen=True)
class Entry:
    """One parameter of a model: its shape, the layers stacked in it, and the reason if it stays dense.

    Distributions and updates treat every stacked matrix as a layer of its own.

    Attributes:
        name: the parameter's name in ``model.named_parameters()``.
        size: the number of elements of the parameter; of an exchanged layer that of its whole matrix.
        full_shape: the shape of the parameter as torch stores it; of an exchanged layer that of its whole matrix.
        shape: the shape of one layer, always in the order (outputs, inputs of one output, *kernel*); empty where the
            parameter can never be sparse.
        parts: the number of equal matrices stacked along dimension 0: three in the in-projection of an attention, one
            for each gate in an LSTM, otherwise 1.
        reason: why the parameter stays dense; empty where it becomes sparse.
        transposed: True for the weight of a transposed convolution, which torch stores with the inputs first.
        linear: True for the weight of a linear layer.
        groups: of a convolution, the groups in which its outputs read inputs of their own.
        live_alone: True for an exchanged layer, which holds its live weights alone.
        rows_together: consecutive rows of an exchanged layer that read the same inputs, as many in each group of rows; 0 for
            a layer in which there are none, and for others.
    """

    name: str
    size: int
    full_shape: tuple[int, ...]
    shape: tuple[int, ...] = ()
    parts: int = 1
    reason: str = ""
    transposed: bool = False
    linear: bool = False
    groups: int = 1
    live_alone: bool = False
    rows_together: int = 0

    @property
    def layers(self) -> list[str]:
        """Names of the layers in this parameter: its own name, with an index where several layers are stacked."""
        return [self.name] if self.parts == 1 else [f"{self.name}[{i}]" for i in range(self.parts)]

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Views of ``tensor`` (of the parameter's shape), one for each layer."""
        return (tensor,) if self.parts == 1 else tensor.chunk(self.parts)


def entry_of(found: Mapping[str, Entry], layer: str) -> Entry:
    """The parameter that holds a layer: of its name, or that in which it is stacked.

    Args:
        found: parameters by name.
        layer: the name of a layer.
    """
    return found.get(layer) or found[layer.rpartition("[")[0]]


def layer_shapes(entries: Iterable[Entry]) -> dict[str, tuple[int, ...]]:
    """Shape (outputs, inputs of one output, *kernel*) of every layer that becomes sparse, by the layer's name."""
    return {layer: e.shape for e in entries if not e.reason for layer in e.layers}


def _weights_that_may_be_sparse(module: nn.Module) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Local name, number of stacked matrices and (out, in, *kernel) shape of every weight of ``module`` that may be
    sparse."""
    own = {name: p for name, p in module._parameters.items() if p is not None and not _is_source(module, name)}
    if isinstance(module, SparseLinear):
        yield "weight", 1, (module.out_features, module.in_features)
    elif isinstance(module, nn.Linear | _ConvNd | nn.Embedding | nn.EmbeddingBag):
        if (weight := own.get("weight")) is not None:
            yield "weight", 1, _forward_shape(module, tuple(weight.shape))
    elif isinstance(module, nn.MultiheadAttention):
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if name in own:
                rows, columns = own[name].shape
                parts = 3 if name == "in_proj_weight" else 1
                yield name, parts, (rows // parts, columns)
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        # a user's subclass has as many gates as the class of torch that it derives from
        gates = next(_GATES[c.__name__] for c in type(module).__mro__ if c.__name__ in _GATES)
        for name, p in own.items():
            if name.startswith("weight"):
                # weight_hr projects the output of an LSTM, after the gates
                parts = 1 if name.startswith("weight_hr") else gates
                yield name, parts, (p.shape[0] // parts, p.shape[1])


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises what passes through it."""
    # by name too: the norms of other libraries derive from nn.Module alone
    return isinstance(module, _NORMS) or "Norm" in type(module).__name__


def why_not_ranked(weight: Tensor) -> str:
    """Why the type of ``weight`` has no order to prune by; empty where it has."""
    # integers are codes of a quantised weight as a rule, and floats of one byte have no arithmetic in torch
    if weight.is_floating_point() and weight.dtype.itemsize > 1:
        return ""
    return f"{str(weight.dtype).removeprefix('torch.')}: only weights in float16, bfloat16, float32 and float64 become sparse"


def _full_shape(module: nn.Module, local: str, parameter: Tensor) -> tuple[int, ...]:
    """The shape of the parameter named ``local`` inside ``module``: of live values that of the whole matrix."""
    if isinstance(module, SparseLinear) and local == "weight":
        return (module.out_features, module.in_features)
    return tuple(parameter.shape)


def _forward_shape(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stored ``shape`` of a weight in the order (outputs, inputs of one output, *kernel*)."""
    if isinstance(module, _ConvTransposeNd):  # stored as (in, out / groups, *kernel)
        return (module.out_channels, module.in_channels // module.groups, *shape[2:])
    return shape


def _reason_never_sparse(module: nn.Module, local: str) -> str:
    """The reason why the parameter named ``local`` inside ``module`` is never sparse."""
    if is_norm(module):
        return "norm"
    if "bias" in local:
        return "bias"
    if _is_source(module, local):
        return _REPARAMETRISED
    return f"not a weight of a supported layer ({type(module).__name__})"


def _is_source(module: nn.Module, local: str) -> bool:
    """Whether a weight is computed from the parameter named ``local`` in each forward pass."""
    if isinstance(module, ParametrizationList):
        return local.startswith("original")
    weights = [local.removesuffix(s) for s in _SUFFIXES if local.endswith(s)]
    # the computed weight is an attribute of the module, and no parameter of it any longer
    return any(w not in module._parameters and hasattr(module, w) for w in weights)


def entries(model: nn.Module) -> list[Entry]:
    """Every parameter of ``model`` once, in the order of ``named_parameters``; ``reason`` is empty where the parameter
    may be sparse.

    Raises:
        ValueError: a parameter has no shape yet.
    """
    roles: dict[int, Entry] = {}
    embeddings: set[int] = set()
    for module_name, module in model.named_modules():
        for local, p in module._parameters.items():
            if isinstance(p, UninitializedParameter):
                raise ValueError(
                    f"{module_name}.{local} has no shape yet (a lazy module): masks cannot be made. Run one batch "
                    "through the model, for example in configure_model, before fit starts."
                )
            if p is not None and id(p) not in roles:
                name = f"{module_name}.{local}" if module_name else local
                shape = _full_shape(module, local, p)
                roles[id(p)] = Entry(name, math.prod(shape), shape, reason=_reason_never_sparse(module, local))
        for local, parts, shape in _weights_that_may_be_sparse(module):
            p = module._parameters[local]
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                embeddings.add(id(p))
            # of the modules that share a tied weight, the first one decides on its layers
            if p is not None and roles[id(p)].shape == ():
                roles[id(p)] = replace(
                    roles[id(p)],
                    parts=parts,
                    shape=shape,
                    reason=why_not_ranked(p),
                    transposed=isinstance(module, _ConvTransposeNd),
                    linear=isinstance(module, nn.Linear | SparseLinear),
                    groups=module.groups if isinstance(module, _ConvNd) else 1,
                    live_alone=isinstance(module, SparseLinear),
                    rows_together=module.group
                    if isinstance(module, SparseLinear) and module.storage == "grouped"
                    else 0,
                )
    found = []
    for name, p in model.named_parameters():
        entry = replace(roles[id(p)], name=name)
        if id(p) in embeddings:
            # also where the embedding shares its weight with a Linear layer: a lookup table is sparse on request only
            entry = replace(entry, reason=entry.reason or _EMBEDDING, linear=False)
        found.append(entry)
    return found


def patterns(value: str | Iterable[str] | None, argument: str) -> tuple[str, ...] | None:
    """``include`` or ``exclude`` as a tuple of globs; one string is one glob."""
    if value is None:
        return None
    globs = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    if not globs and argument == "exclude":
        return None  # nothing is left out
    if not globs or not all(isinstance(g, str) and g for g in globs):
        raise ValueError(
            f"{argument}={value!r} is neither a glob nor a list of globs. Give for example {argument}=['conv*', "
            "'fc.weight']."
        )
    return globs


def select(
    model: nn.Module,
    include: tuple[str, ...] | None = None,
    exclude: tuple[str, ...] | None = None,
    keep_dense: KeepDense | None = None,
    trained: set[int] | None = None,
) -> list[Entry]:
    """Every parameter of ``model``, with the reason why it stays dense; the reason is empty where it becomes sparse.

    Args:
        model: the model whose parameters are selected by their names in ``model.named_parameters()``. A tied weight
            counts once, and a glob may match any of the names that it has.
        include: globs over parameter names; only weights that match at least one glob become sparse. An embedding needs
            a glob other than ``"*"``. None: every weight of a supported layer except embeddings.
        exclude: globs over parameter names; weights that match at least one glob stay dense. None: no weight.
        keep_dense: which weights, in the order of registration, stay dense: the first, the last or both. None: neither.
        trained: the ``id`` of every parameter that some optimizer steps; other parameters stay dense. None: all
            parameters count as trained.

    Raises:
        ValueError: a glob matches nothing, or nothing is left to make sparse; the message lists the candidates.
    """
    # globs may use any name of a tied weight, while entries have its first name only
    aliases: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(p), []).append(name)
    found = entries(model)
    objects = dict(model.named_parameters())
    candidates = [e for e in found if e.reason in ("", _EMBEDDING) and e.size > 0]
    names = {e.name: aliases[id(objects[e.name])] for e in found}
    for glob in include or ():
        if not any(fnmatchcase(n, glob) for e in candidates for n in names[e.name]):
            raise ValueError(_matches_nothing("include", glob, candidates, found, names))
    # exclude= may also match what stays dense anyway, such as a whole block with its norms
    for glob in exclude or ():
        if not any(fnmatchcase(n, glob) for some in names.values() for n in some):
            raise ValueError(_matches_nothing("exclude", glob, candidates, found, names))
    kernels = [e.name for e in candidates if not e.reason]
    # Candidates that a later rule keeps dense count too: the first and last layers are those of the network.
    ends = {"first": kernels[:1], "last": kernels[-1:], "both": kernels[:1] + kernels[-1:]}.get(keep_dense or "", [])

    def decide(entry: Entry) -> str:
        # the first rule that applies is reported, so the order of these tests is seen by the user
        if entry not in candidates:
            return entry.reason or "empty"

        def matches(globs: Iterable[str]) -> bool:
            return any(fnmatchcase(n, g) for g in globs for n in names[entry.name])

        # the only reason that include= overrules is that of an embedding, and a bare "*" does not name one
        if entry.reason and not (include and matches(g for g in include if g != "*")):
            return entry.reason
        if include is not None and not matches(include):
            return "not matched by include="
        if exclude is not None and matches(exclude):
            return "matched by exclude="
        if entry.name in ends:
            return (
                f"{'first' if entry.name == ends[0] and keep_dense != 'last' else 'last'} layer, kept dense on request"
            )
        if not objects[entry.name].requires_grad:
            return NOT_TRAINED[0]
        if trained is not None and id(objects[entry.name]) not in trained:
            return NOT_TRAINED[1]
        return ""

    chosen = [replace(e, reason=decide(e)) for e in found]
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) and any(e.name == f"{name}.weight" and not e.reason for e in chosen):
            raise ValueError(
                f"{name} is an embedding with sparse=True, whose gradients are sparse tensors and cannot be masked. "
                "Use sparse=False, or leave it out of include=."
            )
    if all(e.reason for e in chosen):
        raise ValueError(_nothing_left(chosen))
    return chosen


def _nothing_left(chosen: Sequence[Entry]) -> str:
    """The error where every parameter stays dense."""
    listed = ", ".join(f"{e.name} ({e.reason})" for e in chosen if e.shape)
    text = f"no parameter is left to make sparse. Candidates, and why each stays dense: {listed or _NO_CANDIDATE}"
    if sources := [e.name for e in chosen if e.reason == _REPARAMETRISED]:
        if not listed:
            text = "no parameter is left to make sparse: the weights of all supported layers are reparametrised"
        return (
            f"{text}. In each forward pass a weight is computed from {', '.join(sources)} (as by weight_norm, "
            "spectral_norm or prune), so a mask would not be one of the weight. Make plain weights of them before "
            "training, with torch.nn.utils.parametrize.remove_parametrizations (remove_weight_norm, "
            "remove_spectral_norm or prune.remove for the older functions), or train without this method."
        )
    if any(e.reason in NOT_TRAINED for e in chosen):
        return (
            f"{text}. What is frozen or in no optimizer becomes sparse once it is trained, in a run in which some sparse layer "
            "is trained from the start: let include=, exclude= or keep_dense= leave one, or thaw a layer before the run."
        )
    return f"{text}. Change include=, exclude= or keep_dense=."


def _matches_nothing(
    argument: str, glob: str, candidates: Sequence[Entry], found: Sequence[Entry], names: Mapping[str, Sequence[str]]
) -> str:
    """The error for a glob of ``include`` or ``exclude`` that matches no parameter.

    Args:
        argument: name of the argument.
        glob: the glob.
        candidates: the parameters that can be sparse.
        found: all parameters.
        names: for each parameter all of its names.
    """
    listed = ", ".join(e.name for e in candidates) or _NO_CANDIDATE
    advice = "Use include=['*'] for every matrix and kernel." if argument == "include" else f"Drop it from {argument}=."
    reasons = dict.fromkeys(e.reason for e in found if any(fnmatchcase(n, glob) for n in names[e.name]))
    why = f" What it matches stays dense: {', '.join(reasons)}." if reasons else ""
    return f"{argument}=[{glob!r}] matches no parameter that can be sparse. Candidates: {listed}. {advice}{why}"
