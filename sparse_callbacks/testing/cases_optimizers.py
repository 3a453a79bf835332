"""The contract for several optimizers, and for parameters that are frozen, unused or tied."""

import copy
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sparse_callbacks.testing.comparison import assert_counts, assert_effective, differences, sparse_weights
from sparse_callbacks.testing.networks import Classifier, Rivals, conv_net
from sparse_callbacks.testing.runs import fit, watch
from sparse_callbacks.testing.subject import Contract, needs


@needs("one network", "planned counts")
def test_several_optimizers(self: Contract) -> None:
    """A step of one optimizer touches no weight, mask, state or count of the other."""
    callback, module = self.method(), Rivals()
    nets, calls, replaced, checked = [module.maker, module.critic], [0, 0], [0, 0], [0]
    last: dict[str, Any] = {}

    def see() -> dict[str, Any]:
        steps = callback.state_dict()["steps"]
        return copy.deepcopy(
            {
                "weights": [{n: p.detach() for n, p in net.named_parameters()} for net in nets],
                "states": [o.state_dict()["state"] for o in module.trainer.optimizers],
                "masks": [
                    {n: m for n, m in callback.masks.items() if n.startswith(part)} for part in ("maker", "critic")
                ],
                "steps": [steps["0"], steps["1"]],
            }
        )

    def before_clip(index: int) -> None:
        for key, (_, mask) in sparse_weights(module, callback).items():
            if key.startswith(("maker", "critic")[index]):
                gradient = module.get_parameter(key).grad
                assert gradient is not None
                if not mask.all() and self.promises("gradients ready for a clip by hand"):
                    self.assert_gradient(callback, key, gradient)
                checked[0] += 1
        last.update(see())

    def after_step(index: int) -> None:
        calls[index] += 1
        now, other = see(), 1 - index
        for kind in ("weights", "states", "masks", "steps"):
            assert differences(last[kind][other], now[kind][other]) == [], (
                f"a step of optimizer {index} touched the other's {kind}"
            )
        biases = [{k: v for k, v in w["weights"][index].items() if "bias" in k} for w in (last, now)]
        moved = differences(biases[0], biases[1])
        if now["steps"][index] == last["steps"][index]:
            replaced[index] += 1
            assert moved == []
        else:
            assert now["steps"][index] == last["steps"][index] + 1
            assert len(moved) == 2
        assert_effective(module, callback)

    module.before_clip, module.after_step = before_clip, after_step
    trainer = fit(module, callback)
    assert calls == [16, 32]
    assert trainer.global_step == 48
    sparse = [sum(n.startswith(part) for n in callback.masks) for part in ("maker", "critic")]
    assert checked == [sum(count * times for count, times in zip(sparse, calls, strict=True))]
    assert all(sparse)
    assert [now + r for now, r in zip(see()["steps"], replaced, strict=True)] == calls
    assert replaced in (
        [0, 0],
        [4, 5],
    )  # at the steps 0, 3, 6, 9 and 12 of each optimizer, as far as they come, or never
    assert (callback.updates > 2) == self.moves()
    assert_counts(callback)


@needs("one network", "planned counts")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_unused_and_tied_parameters(self: Contract, optimizer: str) -> None:
    """Frozen parameters stay dense, unused ones keep their values, tied ones stay tied."""

    class Odd(Classifier):
        def __init__(self) -> None:
            super().__init__(conv_net(), optimizer)
            self.frozen, self.unused = nn.Linear(4, 16).requires_grad_(False), nn.Linear(16, 16)
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
            self.second.weight = self.first.weight

        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self(x), y)

        def forward(self, x: Tensor) -> Any:
            return self.second(torch.tanh(self.first(self.frozen(self.net(x)))))

    callback, module = self.method(), Odd()
    frozen, unused = module.frozen.weight.clone(), module.unused.weight.detach().clone()
    seen: list[Tensor] = []
    always = torch.ones(16, 16, dtype=torch.bool)

    def check(trainer: pl.Trainer, module: Odd, index: int) -> None:
        assert_effective(module, callback)
        seen.append(callback.masks["first.weight"].clone())
        always.logical_and_(callback.masks["unused.weight"])

    # also the first masks: the first step may have grown a weight, from zero
    begins = pl.callbacks.LambdaCallback(on_train_start=lambda *_: always.logical_and_(callback.masks["unused.weight"]))
    fit(module, callback, begins, watch(check))
    assert torch.equal(module.frozen.weight, frozen)
    assert "frozen" in callback.plan()["frozen.weight"].reason
    assert "frozen.weight" not in callback.masks
    assert "second.weight" not in callback.masks
    assert module.second.weight is module.first.weight
    assert any(not torch.equal(seen[0], m) for m in seen) == (self.moves_at_all() or not self.promises("one network"))
    assert always.any()
    assert torch.equal(module.unused.weight[always], unused[always])
    assert_counts(callback)
