"""Probes the table of operations: whether a rule hands on the axes that an operation really keeps apart.

``PYTHONPATH=tests:. python -m support.operation_probe`` prints what the rules keep without need, and the rows that no
sample reaches.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_callbacks.channels.axes import AnyAxis, Run, resolved, runs_in
from sparse_callbacks.channels.met_axes import units
from sparse_callbacks.channels.trace import Trace

SUMMED = (
    "mm",
    "bmm",
    "mv",
    "dot",
    "matmul",
    "addmm",
    "addmv",
    "baddbmm",
    "_addmm_activation",
    "convolution",
    "_convolution",
    "conv1d",
    "conv2d",
    "conv3d",
    "mkldnn_convolution",
    "mkldnn_rnn_layer",
    "_trilinear",
)
"""Operations that may end an axis without a reason: they sum over it, so that entries of zero can go."""


def words(text: str) -> list[str]:
    """The words of a text, such as names of operations."""
    return text.split()


@dataclass
class Sizes:
    """The numbers that a model computes from sizes, for the tensors of a sample, whole or with entries removed.

    Attributes:
        shapes: shape of each output.
        kept: the entries that are left, bool, by the number of an input and its dimension; empty for whole inputs.
    """

    shapes: list[list[int]]
    kept: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> list[int]:
        """Shape of the first output."""
        return self.shapes[0]

    def at(self, dim: int, place: int, of: int = 0) -> int:
        """How many of the first ``place`` entries of an input along ``dim`` are left."""
        return int(self.kept[of, dim][:place].sum()) if (of, dim) in self.kept else place


@dataclass
class Sample:
    """One call of an operation.

    Attributes:
        name: the row that it shall reach, such as ``"aten.add"``.
        function: called with the tensors and a :class:`Sizes`; it must not write to the tensors.
        shapes: shapes of its inputs, normal numbers in float64; or the tensors.
        shape: shape of the output where ``function`` asks for it.
        random: whether outputs are random, so that only their shapes are compared.
        inference: whether its tensors are made in inference mode, in which composite operations stay whole.
        dtype: of the inputs that are given by their shapes.
    """

    name: str
    function: Callable[..., Any]
    shapes: Sequence[Sequence[int] | Tensor]
    shape: Sequence[int] | Sequence[Sequence[int]] = ()
    random: bool = False
    inference: bool = False
    dtype: torch.dtype = torch.float64

    def inputs(self) -> list[Tensor]:
        """Its inputs, the same ones each time."""
        draw = torch.Generator().manual_seed(0)
        return [
            s.clone() if isinstance(s, Tensor) else torch.randn([*s], generator=draw, dtype=self.dtype)
            for s in self.shapes
        ]

    def whole(self) -> Sizes:
        """The sizes of its whole inputs."""
        several = len(self.shape) > 0 and not isinstance(self.shape[0], int)
        return Sizes([[*s] for s in self.shape] if several else [[*self.shape]])  # type: ignore[misc, arg-type]

    def call(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        """The tensors that it returns."""
        with torch.no_grad():
            made = self.function(*tensors, sizes)
        return [t for t in (made if isinstance(made, tuple | list) else [made]) if isinstance(t, Tensor)]


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name.replace("::", ".").rstrip("_"))
        return func(*args, **(kwargs or {}))


@contextmanager
def _in_mode(sample: Sample) -> Iterator[None]:
    with torch.inference_mode(sample.inference), torch.no_grad():
        yield


class _Model(nn.Module):
    """A sample's inputs as buffers, and for each output a buffer that is added to it, so that it gets its axes."""

    def __init__(self, sample: Sample, outputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.sample, self.count = sample, len(outputs)
        for number, tensor in enumerate(sample.inputs()):
            self.register_buffer(f"input{number}", tensor)
        for number, tensor in enumerate(outputs):
            self.register_buffer(f"output{number}", torch.zeros_like(tensor))

    def forward(self) -> None:
        inputs = [self.get_buffer(f"input{n}") for n in range(len(self.sample.shapes))]
        for number, made in enumerate(self.sample.call(inputs, self.sample.whole())):
            self.get_buffer(f"output{number}").add_(made)  # in place, so that it counts without being an output


def _called(sample: Sample) -> tuple[list[Tensor], set[str]]:
    """What a sample returns, and the names of the operations that it calls."""
    with _in_mode(sample), _Names() as names:
        outputs = sample.call(sample.inputs(), sample.whole())
    return outputs, names.names


@dataclass
class Probe:
    """A sample, and what the trace says of it.

    Attributes:
        sample: the sample.
        reached: names of the operations that it calls.
        outputs: what it returns.
        inputs_axes, outputs_axes: axes of its tensors.
    """

    sample: Sample
    reached: set[str]
    outputs: list[Tensor]
    inputs_axes: list[list[AnyAxis]]
    outputs_axes: list[list[AnyAxis]]

    def runs(self) -> list[Run]:
        """The runs of more than one channel that its inputs are made of."""
        every = [r for axes in self.inputs_axes for a in axes for r in runs_in(a) if r.size > 1]
        return [*{id(r): r for r in every}.values()]

    def places(self, run: Run, axes: Sequence[Sequence[AnyAxis]]) -> dict[tuple[int, int], Tensor]:
        """The unit of every entry, by the number of the tensor and the dimension, where ``run`` occurs there."""
        found = {(n, d): torch.tensor(units(a, run)) for n, row in enumerate(axes) for d, a in enumerate(row)}
        return {place: u for place, u in found.items() if (u >= 0).any()}


def probed(sample: Sample) -> Probe:
    """Record a sample.

    Raises:
        ValueError: it fails, or the rule does.
    """
    outputs, reached = _called(sample)
    if sample.name not in reached:
        sample = replace(sample, inference=True)
        outputs, reached = _called(sample)
    with _in_mode(sample):
        model = _Model(sample, outputs)
        trace = Trace(model, (), seconds=60)
    inputs, made = (
        [trace.axes[f"{kind}{n}"] for n in range(count)]
        for kind, count in (("input", len(sample.shapes)), ("output", len(outputs)))
    )
    return Probe(sample, reached, outputs, inputs, made)


def faults(probe: Probe) -> list[str]:
    """What the rule says and the operation does not do; empty where the rule is right."""
    found = []
    for row, made in zip(probe.outputs_axes, probe.outputs, strict=True):
        if [resolved(a).size for a in row] != [*made.shape]:
            found.append(f"{probe.sample.name}: axes of {[resolved(a).size for a in row]} for {[*made.shape]}")
    for run in probe.runs():
        if run.reason:
            continue
        ends, begins = probe.places(run, probe.outputs_axes), probe.places(run, probe.inputs_axes)
        where = f"{probe.sample.name}: {run.size} channels at {sorted(begins)} -> {sorted(ends)}"
        for keep in _keeps(run.size):
            if problem := removal_changes(probe.sample, probe.outputs, begins, ends, keep):
                found.append(f"{where}, keep {keep.nonzero().flatten().tolist()}: {problem}")
                break
        for unit in range(run.size if ends else 0):
            if one_changes_others(probe.sample, probe.outputs, begins, ends, unit):
                found.append(f"{where}: channel {unit} changes others")
                break
    return found


def _keeps(size: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(size)
    keeps = [torch.arange(size) != 0, torch.arange(size) != size - 1, torch.arange(size) % 2 == 0]
    return [*keeps, *(torch.randperm(size, generator=draw) < max(size // 2, 1) for _ in range(2))]


def removal_changes(
    sample: Sample,
    outputs: Sequence[Tensor],
    begins: dict[tuple[int, int], Tensor],
    ends: dict[tuple[int, int], Tensor],
    keep: Tensor,
) -> str:
    """How outputs change when entries of channels are removed; empty where the others stay as they are.

    Args:
        sample: the sample.
        outputs: what it returns.
        begins: channel of each entry by input and dimension, -1 for none.
        ends: the same for the outputs.
        keep: bool [channels].
    """
    inputs = sample.inputs()
    if not ends and any(f"aten.{name}" == sample.name for name in SUMMED):  # it may lose entries that are zero
        inputs = [_changed(t, n, begins, lambda u: (u >= 0) & ~keep[u], 0.0) for n, t in enumerate(inputs)]
        with _in_mode(sample):
            outputs = sample.call(inputs, sample.whole())
    kept = {place: (u < 0) | keep[u] for place, u in begins.items()}
    left = [_cut(t, n, kept) for n, t in enumerate(inputs)]
    expected = [_cut(t, n, {place: (u < 0) | keep[u] for place, u in ends.items()}) for n, t in enumerate(outputs)]
    try:
        with _in_mode(sample):
            # made in this mode, as the inputs of the recording were
            got = sample.call([t.clone() for t in left], Sizes([[*t.shape] for t in expected], kept))
    except (RuntimeError, IndexError, ValueError) as error:
        return str(error).splitlines()[0]
    for one, other in zip(got, expected, strict=True):
        if one.shape != other.shape:
            return f"shape {[*one.shape]} instead of {[*other.shape]}"
        exact = 1e-12 if one.dtype in (torch.float64, torch.complex128) else 1e-5
        if not sample.random and not torch.allclose(one, other, exact, exact, equal_nan=True):
            return "other values"
    return ""


def one_changes_others(
    sample: Sample,
    outputs: Sequence[Tensor],
    begins: dict[tuple[int, int], Tensor],
    ends: dict[tuple[int, int], Tensor],
    unit: int,
) -> bool:
    """Whether new values of one channel change outputs of others, be it in the last bit; arguments as before."""
    if sample.random:
        return False
    inputs = [_changed(t, n, begins, lambda u: u == unit, None) for n, t in enumerate(sample.inputs())]
    with _in_mode(sample):
        got = sample.call([t.clone() for t in inputs], sample.whole())
    others = {place: u != unit for place, u in ends.items()}
    return any(
        one.shape != other.shape
        or not torch.equal(_cut(one, n, others).nan_to_num(), _cut(other, n, others).nan_to_num())
        for n, (one, other) in enumerate(zip(got, outputs, strict=True))
        if any(place[0] == n for place in ends)
    )


def _cut(tensor: Tensor, number: int, kept: dict[tuple[int, int], Tensor]) -> Tensor:
    for dim in range(tensor.ndim):
        if (number, dim) in kept:
            tensor = tensor.index_select(dim, kept[number, dim].nonzero().flatten())
    return tensor


def _changed(
    tensor: Tensor,
    number: int,
    begins: dict[tuple[int, int], Tensor],
    which: Callable[[Tensor], Tensor],
    value: float | None,
) -> Tensor:
    """A copy with entries of some channels set to a value, or where that is None turned round along the other dimensions."""
    tensor = tensor.clone()
    for (n, dim), u in begins.items():
        if n == number and tensor.numel():
            places = which(u).nonzero().flatten()
            new = tensor.index_select(dim, places)
            if value is not None:
                new = torch.full_like(new, value)
            elif tensor.dtype == torch.bool:
                new = ~new
            elif tensor.is_floating_point():
                new = new * 1.5 + 0.25
            else:
                new = new.flip([d for d in range(tensor.ndim) if d != dim])
            tensor.index_copy_(dim, places, new)
    return tensor


def stricter_than_needed(probe: Probe) -> list[str]:
    """Input axes that the rule blocks as a whole although the operation keeps them apart along some output axis."""
    found = []
    for number, axes in enumerate(probe.inputs_axes):
        for dim, axis in enumerate(axes):
            size = resolved(axis).size
            if size < 2 or not all(r.reason for r in runs_in(axis)):
                continue
            own = {(number, dim): torch.arange(size)}
            shared = {
                (n, d): torch.arange(size)
                for n, row in enumerate(probe.inputs_axes)
                for d, a in enumerate(row)
                if resolved(a).size == size and n != number
            }
            for begins in (own, own | shared):
                for ends in _ends(probe.outputs, size):
                    if _keeps_apart(probe, begins, ends, size):
                        found.append(f"{probe.sample.name}: {size} entries at {sorted(begins)} -> {sorted(ends)}")
                        break
                else:
                    continue
                break
    return found


def _ends(outputs: Sequence[Tensor], size: int) -> list[dict[tuple[int, int], Tensor]]:
    """One output axis of this size at a time, the same one in all outputs that have it."""
    dims = {d for t in outputs for d, s in enumerate(t.shape) if s == size}
    return [
        {(n, d): torch.arange(size) for n, t in enumerate(outputs) if d < t.ndim and t.shape[d] == size}
        for d in sorted(dims)
    ]


def _keeps_apart(
    probe: Probe, begins: dict[tuple[int, int], Tensor], ends: dict[tuple[int, int], Tensor], size: int
) -> bool:
    try:
        return not any(removal_changes(probe.sample, probe.outputs, begins, ends, k) for k in _keeps(size)) and not any(
            one_changes_others(probe.sample, probe.outputs, begins, ends, u) for u in range(size)
        )
    except (RuntimeError, IndexError, ValueError):
        return False
