"""The network's loss on a fixed list of batches, for scores that are made of its derivatives."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import islice
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_callbacks.core import distributed
from sparse_callbacks.core.error_text import with_class
from sparse_callbacks.core.given_batches import iterated_apart
from sparse_callbacks.core.inspection import attention_in_steps
from sparse_callbacks.core.randomness import generator, seed_restorable
from sparse_callbacks.core.record.samples import samples_in
from sparse_callbacks.core.undisturbed import undisturbed

Loss = Callable[[nn.Module, Any], Tensor]
"""A function of the module and a batch that gives the loss, a scalar."""
LOSS_ADVICE = (
    "Give loss=, a function of module and batch that returns the loss, e.g. "
    "loss=lambda module, batch: cross_entropy(module(batch[0]), batch[1])."
)
BATCHES_ADVICE = "Give batches=, a list or loader of the batches that scores are computed on."

PASSES = (1, 3, 9)
"""What a loss costs in forward passes, by how many times it is differentiated: backward is two products for each one of
forward, and these have two each in turn, behind which the way goes back through forward once more."""


class BatchLoss(NamedTuple):
    """The loss on one batch of a calibration.

    Attributes:
        loss: a scalar, with a graph unless derivatives of order 0 were asked for.
        samples: the number of samples of the batch; None where it holds no tensor that tells.
    """

    loss: Tensor
    samples: int | None


class Calibration:
    """The network's loss on a fixed list of batches, as often as it is asked for.

    Modules are in eval mode (norms take their running statistics, nothing is dropped out), autocast is off, compiled
    modules run eagerly, and every random draw follows from the seed. Every rank sees the batches of rank 0, and meanwhile
    has its running statistics, which are those of a checkpoint. Nothing is left of it: random states, buffers, flags and
    gradients are put back, and hooks that wait for a gradient to be accumulated hear nothing, as derivatives are asked of
    ``torch.autograd.grad``.

    Args:
        module: the module.
        draw: gives the batches, the same ones whenever it is called; only rank 0 iterates over them.
        loss: the loss on a batch.
        size: the number of batches that is used at most; None: all.
        seed: of everything random.
        move: gives a batch as the loss would receive it.
        context: makes the context in which training computes its losses.
        passed: told of each batch and of what is computed with it, in forward passes.
    """

    def __init__(
        self,
        module: nn.Module,
        draw: Callable[[], Iterable[Any]],
        loss: Loss,
        *,
        size: int | None = None,
        seed: int = 0,
        move: Callable[[Any], Any] = lambda batch: batch,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        passed: Callable[[Any, int], object] = lambda batch, passes: None,
    ) -> None:
        self._module, self._draw, self._loss, self._size, self._seed = module, draw, loss, size, seed
        self._move, self._context, self._passed = move, context, passed

    def held(self) -> "Calibration":
        """The same with its batches kept in memory, for losses that are asked for many times."""
        kept: list[Any] = []

        def draw() -> Iterable[Any]:
            if distributed.rank() > 0:
                return self._draw()  # which nobody iterates over
            if not kept:
                with iterated_apart(self._draw()) as batches:
                    kept.extend(islice(iter(batches), self._size))
            return kept

        return Calibration(
            self._module,
            draw,
            self._loss,
            size=self._size,
            seed=self._seed,
            move=self._move,
            context=self._context,
            passed=self._passed,
        )

    @contextmanager
    def losses(self, order: int = 1, limit: int | None = None) -> Iterator[Iterator[BatchLoss]]:
        """The losses of the batches, one after the other, within a ``with`` block in which gradients are on.

        Args:
            order: how many times a loss is going to be differentiated: 0 for no graph, 1, or 2, for which attention runs
                in kernels that have second derivatives.
            limit: the number of batches at most; None: all of the list.

        Raises:
            ValueError: there is no batch, or a loss that is not a scalar with a graph.
        """
        with (
            undisturbed(self._module),
            _gradients_aside(self._module),
            torch.inference_mode(False),
            torch.set_grad_enabled(order > 0),
            ExitStack() as drawing,
        ):
            self._module.eval()
            _take_buffers_of_first_rank(self._module)
            seed_restorable(self._seed)
            # on every rank, so that all of them refuse what cannot be drawn from
            batches = drawing.enter_context(iterated_apart(self._draw()))
            yield self._each(batches, order, limit)

    def _each(self, batches: Iterable[Any], order: int, limit: int | None) -> Iterator[BatchLoss]:
        number = -1
        for number, drawn in enumerate(islice(self._of_first_rank(batches), limit)):
            batch = self._move(drawn)
            # again for each: the first rank has drawn its data in between
            seed_restorable(self._seed + 1 + number)
            with self._context(), differentiable_kernels(self._module, order):
                try:
                    loss = self._loss(self._module, batch)
                except (AttributeError, IndexError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"the loss of {type(self._module).__name__} cannot be computed on batch {number} of those that scores "
                        f"are computed on, a {type(drawn).__name__} ({with_class(error)}). Give batches= as the training "
                        "data has them; where it is the module that gives something else in eval mode, as detectors do, give "
                        f"loss= that computes it all the same. {LOSS_ADVICE}"
                    ) from error
            _refuse_no_loss(loss, order)
            self._passed(batch, PASSES[order])
            yield BatchLoss(loss, samples_in(batch))
        if number < 0:
            raise ValueError(f"scores are computed on batches of data, and there is none. {BATCHES_ADVICE}")

    def _of_first_rank(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches of rank 0, on every rank."""
        drawn = islice(iter(batches), self._size) if distributed.rank() == 0 else iter(())
        while True:
            # in a list, which is empty behind the last one
            sent: list[Any] = distributed.of_first_rank([*islice(drawn, 1)])
            if not sent:
                return
            yield sent[0]


def number_of_batches(batches: object) -> int | None:
    """The number of batches of the training data that ``batches`` asks for; None where it holds the batches themselves.

    Raises:
        ValueError: it is neither a positive number nor an iterable, or one that ends after a single use.
    """
    if isinstance(batches, Integral) and not isinstance(batches, bool) and int(batches) > 0:
        return int(batches)
    if isinstance(batches, Iterator):
        raise ValueError(
            f"batches={type(batches).__name__} can be iterated once, and scores may be computed more often. Give a list or "
            "a loader of batches."
        )
    if not isinstance(batches, Iterable) or isinstance(batches, str):
        raise ValueError(
            f"batches={batches!r} is not a number of batches. Give a whole number from 1 on, or a list or loader of batches."
        )
    return None


def sampling(seed: int) -> torch.Generator:
    """The generator that draws the samples of a calibration."""
    return generator(seed, 0, "calibration")


@contextmanager
def differentiable_kernels(module: nn.Module, order: int) -> Iterator[None]:
    """The kernels whose results can be differentiated ``order`` times in eval mode, and no autocast.

    cuDNN's recurrent kernels have no derivative in eval mode, and fused attention has no second one.
    """
    with ExitStack() as contexts:
        for kind in {p.device.type for p in module.parameters()} | {"cpu"}:
            contexts.enter_context(torch.autocast(kind, enabled=False))
        contexts.enter_context(torch.compiler.set_stance("force_eager"))
        contexts.enter_context(attention_in_steps())
        if any(isinstance(m, nn.RNNBase) for m in module.modules()):
            contexts.enter_context(torch.backends.cudnn.flags(enabled=False))
        if order > 1:
            contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@contextmanager
def requiring_grad(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Derivatives by these parameters can be asked for, also by frozen ones."""
    flags = [(p, p.requires_grad) for p in parameters]
    try:
        for p, _ in flags:
            p.requires_grad = True
        yield
    finally:
        for p, flag in flags:
            p.requires_grad = flag


@contextmanager
def _gradients_aside(module: nn.Module) -> Iterator[None]:
    """Parameters have no gradient meanwhile, and the same tensors as before afterwards."""
    kept = [(p, p.grad) for p in module.parameters()]
    for p, _ in kept:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in kept:
            p.grad = gradient


@torch.no_grad()
def _take_buffers_of_first_rank(module: nn.Module) -> None:
    """Give every rank the buffers that a checkpoint would hold: under DDP each one has running statistics of its own."""
    if distributed.world_size() == 1:
        return
    saved = module.state_dict().keys()
    buffers = {name: b for name, b in module.named_buffers() if name in saved}
    for name, value in distributed.from_owners(buffers, dict.fromkeys(buffers, 0)).items():
        buffers[name].copy_(value)


def _refuse_no_loss(loss: Any, order: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"scores are derivatives of the loss, a scalar, and {found} came in its place. {LOSS_ADVICE}")
    if order and not loss.requires_grad:
        raise ValueError(
            "scores are derivatives of the loss, and it does not depend on any parameter that is trained: it was detached, "
            f"or all parameters are frozen. {LOSS_ADVICE}"
        )
