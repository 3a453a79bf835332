"""The contract with other code: nothing is added, one compiled graph, several callbacks."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from sparse_callbacks.core import schedules
from sparse_callbacks.lightning import methods
from sparse_callbacks.testing.comparison import assert_counts, assert_effective, differences, snapshot, structure
from sparse_callbacks.testing.library import PARTNERS, partner_named
from sparse_callbacks.testing.networks import Classifier, conv_net
from sparse_callbacks.testing.runs import Stops, fit, watch
from sparse_callbacks.testing.subject import STEPS, Contract, needs

# ---------------------------------------------------------------------- other people's code


def test_nothing_is_added_to_the_model(self: Contract) -> None:
    """Nothing is added to the model or left in its optimizer."""
    module, callback, dense = Classifier(), self.method(), Classifier()
    before = structure(module)
    during: list[Any] = []
    plain: list[Any] = []
    fit(dense, watch(lambda trainer, module, _: plain.append(sorted(vars(module)))))
    trainer = fit(module, callback, watch(lambda *_: during.append((structure(module), sorted(vars(module))))))
    assert all(found == (before, attributes) for found, attributes in zip(during, plain, strict=True))
    assert len(during) == STEPS
    assert structure(module) == before
    assert sorted(vars(module)) == sorted(vars(dense))
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_compiled_graph_equal_to_eager(self: Contract, optimizer: str) -> None:
    """A compiled network compiles once and trains like an eager one, bit by bit."""
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    usual, compiled, one, other = (
        Classifier(optimizer=optimizer),
        Classifier(optimizer=optimizer),
        self.method(),
        self.method(),
    )
    torch._dynamo.reset()  # graphs of earlier cases would be counted
    compiled.net.compile(backend=counting)
    expected = snapshot(fit(usual, one), usual, one)
    assert differences(expected, snapshot(fit(compiled, other), compiled, other)) == []
    assert len(graphs) == 1
    assert (other.updates > 2) == self.moves()


@needs("one network", "planned counts", "any share")
def test_two_callbacks_equal_one_over_both_layers(self: Contract, tmp_path: Path) -> None:
    """Also where updates of both are due at the same step, and one of them takes its gradients away."""
    common: dict[str, Any] = {"distribution": "uniform", "partitions": 1, "rounds": 1}
    if hasattr(self.method(), "score") and self.method().arrives_at_stop:
        # in training one of them prunes first, and derivatives of the loss are those of the network that it leaves
        common |= {"score": "magnitude", "batches": 1, "loss": None}
    together = self.method(**common)
    apart = [self.method(**common, **{k: ["net.0.*"]}) for k in ("include", "exclude")]
    assert apart[0].state_key != apart[1].state_key
    whole, halves, stops = Classifier(), Classifier(), Stops(tmp_path, (6,))
    initial: list[dict[str, Tensor]] = []
    begin = pl.callbacks.LambdaCallback(on_train_start=lambda *_: initial.append(together.masks))
    first = fit(whole, together, begin, gradient_clip_val=0.5)
    if together.plan().joint is not None:
        pytest.skip("its layers share one threshold, and those of two callbacks have two")
    assert (len(differences(initial[0], together.masks)) == 3) == self.moves_at_all()
    second = fit(halves, *apart, stops, gradient_clip_val=0.5)
    assert differences(together.masks, apart[0].masks | apart[1].masks) == []
    assert differences(snapshot(first, whole)["weights"], snapshot(second, halves)["weights"]) == []
    assert {(c.step, c.updates) for c in apart} == {(together.step, together.updates)}
    expected = snapshot(second, halves, *apart)
    module, again = (
        Classifier(conv_net(9)),
        [self.method(**common, **{k: ["net.0.*"]}) for k in ("include", "exclude")],
    )
    resumed = fit(module, *again, ckpt_path=stops.path(6), gradient_clip_val=0.5)
    assert differences(expected, snapshot(resumed, module, *again)) == []


@needs("one network", "planned counts", "any share")
@pytest.mark.parametrize("other", PARTNERS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_two_callbacks_on_disjoint_layers(self: Contract, other: str, clip: float | None, tmp_path: Path) -> None:
    """A second method on other layers changes nothing, also after a resume."""
    partner = partner_named(other)

    def make() -> list[Any]:
        one = {"stop": 12, "partitions": 1, "rounds": 1}  # each has one layer
        return [
            self.method(include=["net.0.*"], every=2, **one),
            partner.method(exclude=["net.0.*", "net.7.*"], every=3, **one),
        ]

    module, pair, stops = Classifier(), make(), Stops(tmp_path, (7,))
    biases: list[Tensor] = [module.net[7].bias.detach().clone()]
    counts: list[tuple[int, ...]] = [(0, 0)]

    def check(trainer: pl.Trainer, module: Classifier, index: int) -> None:
        assert_effective(module, *pair)
        biases.append(module.net[7].bias.detach().clone())
        counts.append(tuple(c.step for c in pair))
        moved = not torch.equal(biases[-1], biases[-2])
        assert {now - before for now, before in zip(counts[-1], counts[-2], strict=True)} == {int(moved)}

    expected = snapshot(fit(module, *pair, watch(check), stops, gradient_clip_val=clip), module, *pair)
    assert set(pair[0].masks) == {"net.0.weight"}
    assert set(pair[1].masks) == {"net.4.weight"}
    for callback, chosen in zip(pair, (self, partner), strict=True):
        least = 3 if chosen.promises("updates at an interval") else 1
        # the time of a single pruning, where the network decides it, may not come in so short a run
        waits = not chosen.moves() and not callback.at_target
        assert (callback.updates >= least) == (chosen.moves_at_all() and not waits)
        assert_counts(callback) if callback.at_target else None
    fresh, again = Classifier(conv_net(9)), make()
    assert (
        differences(
            expected, snapshot(fit(fresh, *again, ckpt_path=stops.path(7), gradient_clip_val=clip), fresh, *again)
        )
        == []
    )


# ---------------------------------------------------------------------- words


def test_repr_shows_the_arguments(self: Contract) -> None:
    """repr() shows every argument and can be evaluated."""
    callback = self.method(include=["*.weight"], seed=3, distribution={"*conv*": 0.5, "*": "uniform"})
    text = repr(callback)
    assert text.startswith(f"{type(callback).__name__}(")
    assert all(f"{key}=" in text for key in self.settings.arguments if key != "_target_")
    assert "include=('*.weight',)" in text
    assert "seed=3" in text
    if "distribution" in self.settings.arguments and "any share" not in self.settings.promises_not_made:
        assert "distribution={'*conv*': 0.5, '*': 'uniform'}" in text
    names = vars(schedules) | vars(methods) | {self.callback_class.__name__: self.callback_class}
    names |= {value.__qualname__: value for value in self.settings.arguments.values() if inspect.isfunction(value)}
    for one in (
        callback,
        self.method(),
        self.method(drop_fraction="linear(0.4)", every=0.1, stop=0.5, keep_dense="both"),
    ):
        assert repr(eval(repr(one), names)) == repr(one)
