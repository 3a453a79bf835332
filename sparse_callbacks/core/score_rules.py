"""The scores that masks can be made by, and what each of them needs."""

from typing import NamedTuple


class ScoreRule(NamedTuple):
    """What a score needs.

    Attributes:
        of_loss: it is made of derivatives of the loss on batches.
        rounds: rounds of pruning unless the user gives a number.
        again: scores of a pruned network differ from those of the dense one, so that more rounds have a sense.
        signed: negative scores are the least, and not small by their magnitude.
    """

    of_loss: bool
    rounds: int = 1
    again: bool = True
    signed: bool = False


SCORES = {
    "snip": ScoreRule(of_loss=True),
    "grasp": ScoreRule(of_loss=True, signed=True),
    "synflow": ScoreRule(of_loss=False, rounds=100),
    "crop": ScoreRule(of_loss=True),
    "fisher": ScoreRule(of_loss=True),
    "magnitude": ScoreRule(of_loss=False, again=False),
    "random": ScoreRule(of_loss=False, again=False),
}
MADE_OF_NETWORK = tuple(name for name, rule in SCORES.items() if rule.again)
"""Scores that ask more of a network than the values of its weights."""
