"""Settings of the library's own methods under the contract."""

from collections.abc import Mapping
from typing import Any

from sparse_callbacks.lightning import methods
from sparse_callbacks.testing.networks import loss_on
from sparse_callbacks.testing.settings import Inner, Settings
from sparse_callbacks.testing.subject import Contract

# several updates in 16 steps
_SHORT: Mapping[str, Any] = {"sparsity": 0.8, "every": 3, "stop": 14, "print_plan": False}
# and they move enough weights for some to come straight back
_MANY: Mapping[str, Any] = {**_SHORT, "drop_fraction": 0.5}
# several choices in 16 steps; the networks of the contract have few channels
_CHANNELS: Mapping[str, Any] = {
    "round_to": 1,
    "start": 1,
    "prune_stem": True,
    "every": 3,
    "stop": 14,
    "print_plan": False,
}

LIBRARY: dict[str, Settings] = {
    "CTRE": Settings(
        _MANY,
        promises_not_made={
            "grown weights start from zero": "they are drawn anew from the uniform distribution of the first ones",
            "any layer": "activations of attention and recurrent layers are not known",
        },
    ),
    "DPF": Settings(
        _SHORT,
        gradients="free",  # the dense weights take the step, with the gradient of the pruned network
        promises_not_made={
            "growth": "pruned weights go on learning, so they come back by themselves",
            "pruned weights rest": "a dense copy takes the step",
        },
    ),
    "EarlyCroP": Settings(
        # at the end of the first of two epochs
        {"sparsity": 0.8, "batches": 16, "rounds": 3, "loss": loss_on, "print_plan": False},
        promises_not_made={
            "several updates": "it prunes once",
            "growth": "what is pruned stays pruned",
            "updates at an interval": "it prunes once",
        },
    ),
    "GMP": Settings(_SHORT, promises_not_made={"growth": "what is pruned stays pruned"}),
    "GaP": Settings(
        # four phases of three steps, and fine-tuning
        {"sparsity": 0.8, "every": 3, "partitions": 2, "rounds": 2, "print_plan": False},
        promises_not_made={
            "updates at an interval": "they end with its phases, of which there are as many as partitions in all rounds"
        },
    ),
    "NM": Settings(
        # the networks of the contract have a layer of two inputs; without decay the optimizer sees the gradient of the loss
        {"pattern": "1:2", "every": 3, "decay": 0.0, "print_plan": False},
        gradients="free",
        promises_not_made={
            "any share": "N of M is one share for all layers",
            "growth": "pruned weights go on learning, so they come back by themselves",
            "pruned weights rest": "a dense copy takes the step",
        },
    ),
    "ParallelGaP": Settings(
        # one round of two workers: its phases are whole epochs, and a short run has two
        {"sparsity": 0.8, "partitions": 2, "rounds": 1, "print_plan": False},
        promises_not_made={
            "one network": "each worker trains a partition of its own",
            "several updates": "its phases are whole epochs, and there are two",
            "growth": "workers' networks are joined in place of that",
            "updates at an interval": "its phases are whole epochs",
        },
    ),
    "ChannelPruning": Settings(
        {"budget": 0.6, "criterion": "taylor_fo", **_CHANNELS},
        promises_not_made={
            "planned counts": "its budget decides how many channels go",
            "growth": "what is pruned stays pruned",
        },
    ),
    "ConstrainedL0": Settings(
        # nothing depends on the length of a run; it has a density in place of a sparsity
        {"print_plan": False},
        gradients="free",  # gates scale the gradient, and the dense weights take the step
        promises_not_made={
            "planned counts": "gates close until an expected density is met",
            "several updates": "gates move at every step",
            "growth": "gates open again by themselves",
            "pruned weights rest": "dense weights stand behind the gates",
            "updates at an interval": "gates move at every step",
        },
    ),
    "PruneAtStart": Settings(
        # scores of all batches, which are the same however many processes there are
        {"sparsity": 0.8, "batches": 16, "loss": loss_on, "print_plan": False},
        promises_not_made={
            "several updates": "its masks never move",
            "growth": "its masks never move",
            "updates at an interval": "its masks never move",
        },
    ),
    "RigL": Settings(_MANY),
    "SET": Settings(_MANY),
    "SMCP": Settings(
        {"budget": 0.6, **_CHANNELS},
        gradients="free",
        promises_not_made={
            "planned counts": "its budget decides how many channels go",
            "growth": "pruned channels go on learning, so they come back by themselves",
            "pruned weights rest": "a dense copy takes the step",
        },
    ),
    "SNFS": Settings(_MANY),
    "SupTickets": Settings(
        {"base": Inner(methods.RigL, _MANY), "share": 0.5, "cycles": 1, "low_lr": 0.01, "high_lr": 0.05},
        promises_not_made={
            "planned counts": "the merged ticket shares the planned total out otherwise",
            "runs of a step": "a cycle has three steps at least, and a part of the run comes before",
        },
    ),
    "Static": Settings(
        {"sparsity": 0.8, "print_plan": False},
        promises_not_made={
            "several updates": "its masks never move",
            "growth": "its masks never move",
            "updates at an interval": "its masks never move",
        },
    ),
}

PARTNERS = [
    name for name, found in LIBRARY.items() if not {"one network", "planned counts"} & set(found.promises_not_made)
]
"""Methods that stand beside the one under test, on other layers of the network."""


def partner_named(name: str) -> Contract:
    """How a case makes a method of the library, and what that one promises."""
    fields = {"callback_class": getattr(methods, name), "settings": LIBRARY[name]}
    partner: Contract = type(name, (Contract,), fields)()
    return partner
