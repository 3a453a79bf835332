"""What a user says of the score that masks are made by."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

from sparse_callbacks.core.arguments import refuse_unknown
from sparse_callbacks.core.calibration import Loss, number_of_batches
from sparse_callbacks.core.checkpoint import shown
from sparse_callbacks.core.score_rules import MADE_OF_NETWORK, SCORES, ScoreRule
from sparse_callbacks.core.state_layout import shown_short


@dataclass(frozen=True, eq=False)
class Score:
    """A score of weights, and how it is computed: for ``initial_mask=``, where its name alone takes the defaults.

    Attributes:
        name: ``"snip"``, ``"grasp"``, ``"synflow"``, ``"crop"`` or ``"fisher"``.
        batches: number of batches, whose samples are drawn from the training data with the method's ``seed``; or a list or
            loader of the batches. SynFlow needs none.
        loss: a function of module and batch that gives the loss, a scalar; None: that of the training step.
        rounds: how often scores are computed and weights pruned, to the sparsities 1 - (1 - s)^(k / rounds); None: 100 for
            SynFlow, 1 for the others.
        least: weights that every layer keeps at least, where one ranking goes over all layers.

    Raises:
        ValueError: a value that no run can use.

    Example:
        >>> from sparse_callbacks import RigL, Score
        >>> RigL(0.9, initial_mask=Score("snip", batches=4)).initial_mask
        Score(name='snip', batches=4)
    """

    name: str
    batches: int | Iterable[Any] = 1
    loss: Loss | None = None
    rounds: int | None = None
    least: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(
                f"score={shown_short(self.name)} is not a name. Give one of {', '.join(map(repr, SCORES))}."
            )
        refuse_unknown({"score": self.name}, {"score": SCORES})
        rule = SCORES[self.name]
        number_of_batches(self.batches)
        if self.loss is not None and not callable(self.loss):
            raise ValueError(
                f"loss={self.loss!r} is not a function. Give a function of module and batch that returns the loss."
            )
        if self.rounds is not None:
            _refuse_count("rounds", self.rounds, 1, "rounds of pruning")
        _refuse_count("least", self.least, 0, "weights")
        usual = isinstance(self.batches, Integral) and int(self.batches) == 1
        for argument, given in (("batches", not usual), ("loss", self.loss is not None)):
            if given and not rule.of_loss:
                readers = ", ".join(name for name, other in SCORES.items() if other.of_loss)
                raise ValueError(
                    f"{argument}= says nothing to score={self.name!r}, which looks at no data. Leave {argument}= out, or give "
                    f"one of {readers}."
                )
        if self.rounds not in (None, 1) and not rule.again:
            raise ValueError(
                f"rounds={self.rounds!r}: score={self.name!r} is the same in every round, as it looks at each weight alone. "
                "Give rounds=1."
            )

    @property
    def rule(self) -> ScoreRule:
        """What the score needs."""
        return SCORES[self.name]

    @property
    def number_of_rounds(self) -> int:
        """Rounds of pruning."""
        return self.rule.rounds if self.rounds is None else int(self.rounds)

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        texts = {
            f.name: shown(given[f.name]) for f in fields(self) if f.name == "name" or given[f.name] is not f.default
        }
        return f"Score({', '.join(f'{name}={text}' for name, text in texts.items())})"


def _refuse_count(argument: str, value: object, low: int, what: str) -> None:
    """Refuse what is not a whole number from ``low`` on.

    Raises:
        ValueError: says what to give.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < low:
        raise ValueError(f"{argument}={value!r} is not a number of {what}. Give a whole number from {low} on.")


def score_in(start: object) -> Score | None:
    """The score that ``initial_mask=`` asks for; None where it says something else.

    Raises:
        ValueError: a score that has a word of its own, or an option that no single layer has.
    """
    if isinstance(start, str) and start in MADE_OF_NETWORK:
        return Score(start)
    if not isinstance(start, Score):
        return None
    if not start.rule.again:
        raise ValueError(f"initial_mask={start!r} looks at each weight alone. Give initial_mask={start.name!r} for it.")
    if start.least:
        raise ValueError(
            f"initial_mask={start!r} ranks the weights of each layer by themselves, and how many stay is planned. Leave least= "
            "out, or give PruneAtStart(distribution='global'), where one ranking goes over all layers."
        )
    return start
