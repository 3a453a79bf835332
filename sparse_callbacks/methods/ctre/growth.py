"""Growth by similarity: the positions that an update of CTRE grows, and figures of them."""

from dataclasses import dataclass

from torch import Tensor

from sparse_callbacks.core.ops import keep_largest


def propose_growth(mask: Tensor, weight: Tensor, similarity: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions that stay, and the ``count`` most similar of all others (bool, of the weight's shape).

    All active weights but the ``count`` with the smallest magnitude stay. Those that do not may be proposed again. Of
    equal scores the lower index counts as the larger (Atashgahi et al. 2022, algorithm 1).

    Raises:
        ValueError: ``count`` exceeds the active positions.
    """
    kept = keep_largest(weight, int(mask.count_nonzero()) - count, among=mask)
    # among all that do not stay, those just dropped included: a connection that is still similar may come back
    return kept, keep_largest(similarity, count, among=~kept)


def replace_regrown(mask: Tensor, kept: Tensor, proposed: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Proposals that were inactive, and in place of each other proposal a random position (CTRE_sim).

    A proposal that was active has only just been dropped; growing it again would explore nothing. The random positions
    are neither kept nor accepted proposals (Atashgahi et al. 2022, algorithm 2).

    Args:
        mask: the mask before the update.
        kept, proposed: positions that stay and proposals, see :func:`propose_growth`.
        draw: random numbers in [0, 1) of the weight's shape; the positions with the largest are taken.

    Returns:
        Accepted proposals and random positions; together with ``kept`` they are as many as ``mask`` has.
    """
    accepted = proposed & ~mask
    regrown = int((proposed & mask).count_nonzero())
    # not among the accepted, unlike in the released code: a position that is drawn twice would be one weight too few
    return accepted, keep_largest(draw, regrown, among=~(kept | accepted))


@dataclass
class GrowthFigures:
    """Figures of what an update grew.

    Attributes:
        similar: number of weights grown by similarity.
        drawn: number of weights grown at random.
        similarity: sum of the similarities of the weights in ``similar``.
    """

    similar: int = 0
    drawn: int = 0
    similarity: float = 0.0

    def add(self, similarity: Tensor, grown: Tensor) -> None:
        """Count the positions ``grown`` (bool) of a layer with their ``similarity``."""
        self.similar += int(grown.count_nonzero())
        self.similarity += float(similarity[grown].sum())

    def figures(self) -> dict[str, float]:
        """Shares of weights by how they were grown, and the mean similarity where there is one."""
        grown = max(1, self.similar + self.drawn)
        found = {"by_similarity": self.similar / grown, "at_random": self.drawn / grown}
        if self.similar:  # without any there is no mean, and a 0 in the log would look like one
            found["mean_similarity"] = self.similarity / self.similar
        return found
