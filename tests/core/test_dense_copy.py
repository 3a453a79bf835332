"""Dense values of pruned weights: exchanged by address, found in either buffer, and open to what the user writes."""

import torch
from torch import Tensor, nn

from sparse_callbacks.core.dense_copy import DenseCopy, undone
from sparse_callbacks.core.weights import SparseWeights


def made() -> tuple[nn.Parameter, DenseCopy]:
    p = nn.Parameter(torch.tensor([1.0, 0.0]))
    copy = DenseCopy({"p": p})
    copy.start("p", torch.tensor([1.0, 5.0]))
    return p, copy


def test_buffers_change_places_and_nothing_is_copied() -> None:
    p, copy = made()
    outside, dense = p.data_ptr(), copy.values("p").data_ptr()
    assert outside != dense
    copy.swap_in(["p"])
    assert (p.data_ptr(), p.tolist()) == (dense, [1, 5])
    copy.swap_in(["p"])  # a second time changes nothing
    assert p.data_ptr() == dense
    copy.swap_out(["p"])
    assert (p.data_ptr(), p.tolist()) == (outside, [1, 0])
    copy.swap_out(["p"])
    assert p.data_ptr() == outside


def test_dense_values_are_found_in_and_outside_a_step() -> None:
    p, copy = made()
    waiting = copy.waiting("p")
    assert waiting is not None
    assert waiting.tolist() == [1, 5]
    copy.swap_in(["p"])
    assert copy.waiting("p") is None
    with torch.no_grad():
        p.add_(1)
    assert copy.values("p").tolist() == [2, 6]
    copy.swap_out(["p"])
    assert copy.values("p").tolist() == [2, 6]
    assert p.tolist() == [1, 0]


def test_the_end_within_a_step_gives_the_masked_values_back() -> None:
    p, copy = made()
    copy.swap_in(["p"])
    copy.end(["p"])
    assert p.tolist() == [1, 0]
    assert "p" not in copy
    assert copy.names == []
    assert copy.values("p").data_ptr() == p.data_ptr()


def test_what_a_user_writes_is_absorbed_at_active_weights_only() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    weights = SparseWeights({"p": p}, {}, {"p": torch.tensor([True, True, False])})
    weights.start_copy({"p": torch.tensor([1.0, 2.0, 3.0])})
    weights.write_masked(["p"])
    with torch.no_grad():
        p.copy_(torch.tensor([9.0, 2.0, 8.0]))
    weights.absorb_if_written(["p"])
    assert weights.dense_values("p").tolist() == [9, 2, 3]
    weights.write_masked(["p"])
    assert p.tolist() == [9, 2, 0]


def test_only_writes_by_others_count() -> None:
    p, copy = made()
    copy.mark_written("p")
    assert not copy.was_written("p")
    with torch.no_grad():
        p.mul_(2)
    assert copy.was_written("p")
    copy.mark_written("p")
    assert not copy.was_written("p")


def test_undone_divides_by_the_gate_only_where_somebody_wrote() -> None:
    gate = torch.tensor([0.5, 0.5, 0.0, 0.3])
    dense = torch.tensor([4.0, 4.0, 6.0, 0.7])
    weight: Tensor = gate * dense
    weight[1], weight[2] = 3.0, 1.0
    assert undone(weight, gate, dense).tolist() == [4.0, 6.0, 6.0, dense[3].item()]  # the last bit for bit


def test_undone_loses_no_bit_where_nobody_wrote() -> None:
    gate, dense = torch.linspace(0.1, 0.9, 1000), torch.linspace(-2, 3, 1000)
    assert not torch.equal(gate * dense / gate, dense)
    assert torch.equal(undone(gate * dense, gate, dense), dense)
