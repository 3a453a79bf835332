"""Growth by similarity: what an update keeps, grows and draws, as in the reference."""

import pytest
import torch
from oracles.ctre import GROWTH_INIT, INITIAL_ZERO_SIMILARITY, UPDATE
from torch import Tensor

from sparse_callbacks.core.growth import growth_bound
from sparse_callbacks.methods.ctre.growth import GrowthFigures, propose_growth, replace_regrown


def table(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_an_update_by_similarity_as_in_the_reference() -> None:
    given, expected = UPDATE["inputs"], UPDATE["ctre_seq_or_cte"]
    mask = table(given["mask"]).bool()
    kept, proposed = propose_growth(mask, table(given["weights"]), table(given["similarity"]), UPDATE["n_prune"])
    assert kept.int().tolist() == UPDATE["mask_kept"]
    assert (mask & ~kept).int().tolist() == UPDATE["mask_deleted"]
    assert proposed.int().tolist() == expected["mask_grown"]
    assert (kept | proposed).int().tolist() == expected["mask_after"]
    assert (proposed & ~mask).int().tolist() == expected["newly_initialised"]


def test_rejected_proposals_become_random_as_in_the_reference() -> None:
    given, expected = UPDATE["inputs"], UPDATE["ctre_sim"]
    mask, source, pool = table(given["mask"]).bool(), torch.Generator().manual_seed(0), set()
    kept, proposed = propose_growth(mask, table(given["weights"]), table(given["similarity"]), UPDATE["n_prune"])
    assert proposed.int().tolist() == expected["similarity_candidates"]
    assert (proposed & mask).int().tolist() == expected["re_added"]
    for _ in range(200):
        accepted, drawn = replace_regrown(mask, kept, proposed, torch.rand(12, generator=source))
        assert accepted.int().tolist() == expected["mask_similarity_part"]
        assert int(drawn.sum()) == expected["n_random"]
        assert not (drawn & (kept | accepted)).any()
        assert int((kept | accepted | drawn).sum()) == expected["n_active_after"]
        pool |= set(drawn.nonzero().flatten().tolist())
    assert sorted(pool) == expected["random_pool_intended"]


def test_of_equal_similarities_the_lower_index_grows_as_in_the_reference() -> None:
    given = INITIAL_ZERO_SIMILARITY
    mask, zeros = table(given["mask"]).bool(), torch.zeros(10)
    kept, proposed = propose_growth(mask, table(given["weights"]), zeros, given["n_prune"])
    assert kept.int().tolist() == given["mask_kept"]
    assert proposed.int().tolist() == given["mask_grown"]


def test_the_count_stays_over_a_thousand_random_updates() -> None:
    source = torch.Generator().manual_seed(0)
    for trial in range(1000):
        shape = (int(torch.randint(1, 7, (), generator=source)), int(torch.randint(1, 9, (), generator=source)))
        mask = torch.rand(shape, generator=source) < 0.1 + 0.8 * (trial % 10) / 10
        active = int(mask.sum())
        count = int(torch.randint(0, active + 1, (), generator=source))
        weight, similarity, draw = (
            torch.rand(shape, generator=source).mul(4).round() for _ in range(3)
        )  # with many ties
        kept, proposed = propose_growth(mask, weight * mask, similarity, count)
        accepted, drawn = replace_regrown(mask, kept, proposed, draw)
        assert int((kept | proposed).sum()) == int((kept | accepted | drawn).sum()) == active
        assert int(kept.sum() + accepted.sum() + drawn.sum()) == active  # no position is counted twice


def test_new_weights_are_bounded_as_in_the_reference() -> None:
    for inputs, bound in GROWTH_INIT["bounds"].items():
        assert growth_bound((3, int(inputs))) == pytest.approx(bound, abs=1e-12)
    assert growth_bound((8, 50, 3, 4)) == growth_bound((1, 600))


def test_figures_of_an_update() -> None:
    grown = GrowthFigures()
    assert grown.figures() == {"by_similarity": 0.0, "at_random": 0.0}
    grown.add(torch.tensor([0.5, 0.9, 0.1]), torch.tensor([True, False, True]))
    grown.drawn += 6
    assert grown.figures() == pytest.approx({"by_similarity": 0.25, "at_random": 0.75, "mean_similarity": 0.3})
