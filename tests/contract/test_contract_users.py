"""The contract with other code: nothing is added, one compiled graph, several callbacks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.inside import forget_compiled_code
from support.methods import CONFIGS, MASKED, STEPS, every_masked_method, every_method, method, moves, promises
from support.nets import Classifier, conv_net
from support.rig import Stops, assert_counts, assert_effective, differences, fit, snapshot, structure, watch
from torch import Tensor

import sparse_callbacks

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


# ---------------------------------------------------------------------- other people's code


@every_method
def test_nothing_is_added_to_the_model(name: str) -> None:
    module, callback, dense = Classifier(), method(name), Classifier()
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


@every_method
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_compiled_graph_equal_to_eager(name: str, optimizer: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    usual, compiled, one, other = (
        Classifier(optimizer=optimizer),
        Classifier(optimizer=optimizer),
        method(name),
        method(name),
    )
    forget_compiled_code()
    compiled.net.compile(backend=counting)
    expected = snapshot(fit(usual, one), usual, one)
    assert differences(expected, snapshot(fit(compiled, other), compiled, other)) == []
    assert len(graphs) == 1
    assert (other.updates > 2) == moves(name)


@every_masked_method
def test_two_callbacks_equal_one_over_both_layers(name: str, tmp_path: Path) -> None:
    """Also where updates of both are due at the same step, and one of them takes its gradients away."""
    common = {"distribution": "uniform", "partitions": 1, "rounds": 1}
    together = method(name, **common)
    apart = [method(name, **common, **{k: ["net.0.*"]}) for k in ("include", "exclude")]
    assert apart[0].state_key != apart[1].state_key
    whole, halves, stops = Classifier(), Classifier(), Stops(tmp_path, (6,))
    initial: list[dict[str, Tensor]] = []
    begin = pl.callbacks.LambdaCallback(on_train_start=lambda *_: initial.append(together.masks))
    first = fit(whole, together, begin, gradient_clip_val=0.5)
    assert (len(differences(initial[0], together.masks)) == 3) == moves(name)
    second = fit(halves, *apart, stops, gradient_clip_val=0.5)
    assert differences(together.masks, apart[0].masks | apart[1].masks) == []
    assert differences(snapshot(first, whole)["weights"], snapshot(second, halves)["weights"]) == []
    assert {(c.step, c.updates) for c in apart} == {(together.step, together.updates)}
    expected = snapshot(second, halves, *apart)
    module, again = (
        Classifier(conv_net(9)),
        [method(name, **common, **{k: ["net.0.*"]}) for k in ("include", "exclude")],
    )
    resumed = fit(module, *again, ckpt_path=stops.path(6), gradient_clip_val=0.5)
    assert differences(expected, snapshot(resumed, module, *again)) == []


@every_masked_method
@pytest.mark.parametrize("other", MASKED)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_two_callbacks_on_disjoint_layers(name: str, other: str, clip: float | None, tmp_path: Path) -> None:
    def make() -> list[Any]:
        one = {"stop": 12, "partitions": 1, "rounds": 1}  # each has one layer
        return [
            method(name, include=["net.0.*"], every=2, **one),
            method(other, exclude=["net.0.*", "net.7.*"], every=3, **one),
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
    for callback, chosen in zip(pair, (name, other), strict=True):
        least = 3 if promises(chosen, "updates at an interval") else 1
        assert (callback.updates >= least) == moves(chosen)
        assert_counts(callback) if callback.at_target else None
    fresh, again = Classifier(conv_net(9)), make()
    assert (
        differences(
            expected, snapshot(fit(fresh, *again, ckpt_path=stops.path(7), gradient_clip_val=clip), fresh, *again)
        )
        == []
    )


# ---------------------------------------------------------------------- words


@every_method
def test_repr_shows_the_arguments(name: str) -> None:
    callback = method(name, include=["*.weight"], seed=3, distribution={"*conv*": 0.5, "*": "uniform"})
    text = repr(callback)
    assert text.startswith(f"{type(callback).__name__}(")
    assert all(f"{key}=" in text for key in CONFIGS[name] if key != "_target_")
    assert "include=('*.weight',)" in text
    assert "seed=3" in text
    assert "distribution" not in CONFIGS[name] or "distribution={'*conv*': 0.5, '*': 'uniform'}" in text
    names = vars(sparse_callbacks) | vars(sparse_callbacks.core.schedules)
    for one in (
        callback,
        method(name),
        method(name, drop_fraction="linear(0.4)", every=0.1, stop=0.5, keep_dense="both"),
    ):
        assert repr(eval(repr(one), names)) == repr(one)
