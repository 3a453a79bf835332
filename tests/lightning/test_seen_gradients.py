"""Which gradients the hooks of others see: what docs/guarantees.md says of on_before_optimizer_step."""

from collections import defaultdict
from typing import Any

import pytest
import pytorch_lightning as pl
from support.inside import copied_names
from support.methods import every_steady_method, method, promises

from sparse_callbacks.testing.networks import ByHand, Classifier
from sparse_callbacks.testing.runs import fit


class Sees:
    """What was seen of the gradients of pruned weights, by who has looked; where they learn on, while they do."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.learns_on = callback.keeps_dense
        self.seen: dict[str, set[str]] = defaultdict(set)

    def look(self, who: str) -> Any:
        def hook(*_: Any) -> None:
            for name, p in self.callback.params.items():
                learns = not self.learns_on or name in copied_names(self.callback)
                if learns and not (mask := self.callback.masks[name]).all():
                    kind = "none" if p.grad is None else "dense" if p.grad[~mask].any() else "masked"
                    self.seen[who].add(kind)

        return hook

    def watcher(self, where: str) -> pl.Callback:
        looks = {hook: self.look(f"{hook} {where}") for hook in ("on_after_backward", "on_before_optimizer_step")}
        return pl.callbacks.LambdaCallback(**looks)


def seen(name: str, module: Any, watched_module: bool = True) -> tuple[dict[str, set[str]], bool]:
    """What was seen, and whether an update has replaced a step."""
    early = (
        {"stop": 4} if name == "early_crop" else {}
    )  # it prunes once, and by hand the run has fewer steps than batches
    callback = method(name, restart=False, **early)
    sees = Sees(callback)
    for hook in ("on_after_backward", "on_before_optimizer_step") if watched_module else ():
        setattr(module, hook, sees.look(f"{hook} module"))
    trainer = fit(module, sees.watcher("before"), callback, sees.watcher("behind"))
    return sees.seen, callback.step < trainer.global_step


@every_steady_method
def test_hooks_see_the_gradients_that_the_documentation_says(name: str) -> None:
    found, replaces = seen(name, Classifier())
    if not promises(name, "pruned weights rest"):
        assert all(kinds == {"dense"} for kinds in found.values())
        return
    for where in ("before", "behind", "module"):
        assert found[f"on_after_backward {where}"] == {"dense"}
    assert found["on_before_optimizer_step before"] == {"dense"}
    for where in ("behind", "module"):
        assert found[f"on_before_optimizer_step {where}"] == ({"masked", "dense"} if replaces else {"masked"})


@every_steady_method
def test_in_manual_optimization_gradients_are_masked_right_after_backward(name: str) -> None:
    found, replaces = seen(name, ByHand(window=2))
    if not promises(name, "pruned weights rest"):
        assert all(kinds == {"dense"} for kinds in found.values())
        return
    assert found["on_after_backward before"] == {"dense"}
    for who in ("on_after_backward behind", "on_after_backward module", "on_before_optimizer_step before"):
        assert found[who] == {"masked"}
    for where in ("behind", "module"):
        assert found[f"on_before_optimizer_step {where}"] == ({"masked", "none"} if replaces else {"masked"})


@pytest.mark.parametrize("watched_module", [False, True])
def test_a_hook_of_an_instance_counts_as_a_reader(watched_module: bool) -> None:
    """Without any reader gradients are not masked at all before the step."""
    found, _ = seen("static", Classifier(), watched_module)
    assert found["on_before_optimizer_step behind"] == {"masked"}
