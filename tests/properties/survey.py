"""Counts many random runs by method, host and how they ended: ``PYTHONPATH=tests python -m properties.survey``."""

import argparse
import math
import traceback
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from support.methods import METHODS

from properties.cases import Case, cases
from properties.runs import Outcome, run


@dataclass
class Survey:
    """What came of many runs."""

    outcomes: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """Runs by (method, host, outcome)."""
    refusals: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Refused runs by (method, words)."""
    failures: list[tuple[Case, str]] = field(default_factory=list)
    """Each failed run, and its traceback."""
    updates: int = 0
    born: int = 0

    def share(self, outcome: str) -> float:
        """The share of runs that ended so, of those that torch can train at all."""
        possible = sum(n for (*_, kind), n in self.outcomes.items() if kind != "not in torch")
        return sum(n for (*_, kind), n in self.outcomes.items() if kind == outcome) / max(1, possible)

    def table(self) -> str:
        """Rows of counts by method and host."""
        kinds = ["trained", "refused", "failed", "not in torch"]
        rows = [f"{'method':14}{'host':9}" + "".join(f"{kind:>14}" for kind in kinds)]
        for method, host in sorted({key[:2] for key in self.outcomes}):
            counts = [self.outcomes[method, host, kind] for kind in kinds]
            rows.append(f"{method:14}{host:9}" + "".join(f"{count:14}" for count in counts))
        totals = [sum(n for key, n in self.outcomes.items() if key[2] == kind) for kind in kinds]
        rows.append(f"{'all':23}" + "".join(f"{total:14}" for total in totals))
        return "\n".join([*rows, f"{self.updates} updates, {self.born} grown weights looked at"])

    def add(self, case: Case) -> None:
        """Train a run, and count how it ended."""
        try:
            outcome = run(case)
        except Exception:
            outcome = Outcome("failed")
            self.failures.append((case, traceback.format_exc()))
        self.outcomes[case.method, case.host, outcome.kind] += 1
        self.updates, self.born = self.updates + outcome.updates, self.born + outcome.born
        if outcome.kind == "refused":
            self.refusals[case.method, outcome.words] += 1


def survey(examples: int, start: int, method: str | None = None) -> Survey:
    """Train random runs, of one method or of all, and go on where one fails.

    Args:
        examples: the number of runs.
        start: the seed of the random choices.
        method: name of the method as in conf/method; None for all.
    """
    found = Survey()
    for name in METHODS if method is None else [method]:
        _look(found, name, math.ceil(examples / (len(METHODS) if method is None else 1)), start)
    return found


def _look(found: Survey, method: str, examples: int, start: int) -> None:
    @seed(start)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(method))
    def look(case: Case) -> None:
        found.add(case)

    look()


def main() -> None:
    """Print the counts, the words of the refusals and the runs that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default=None)
    options = parser.parse_args()
    found = survey(options.examples, options.seed, options.method)
    for (method, words), count in found.refusals.most_common():
        print(f"{count:4} {method}: {words[:200]}")
    for case, trace in found.failures:
        print(f"\n{case}\n{trace}")
    print(f"\n{found.table()}\n{found.share('refused'):.1%} refused, {len(found.failures)} failed")


if __name__ == "__main__":
    main()
