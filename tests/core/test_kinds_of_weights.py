"""Weights that stay dense by their kind, and what is said where few or none are left."""

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.loops import data, loss_of, sgd
from torch import Tensor, nn
from torch.nn.utils import prune

from sparse_callbacks import GMP, RigL, SparsityCallback, Static, sparsify
from sparse_callbacks.core.selection import select
from sparse_callbacks.testing.runs import trainer_for


def reasons(model: nn.Module) -> dict[str, str]:
    return {e.name: e.reason for e in select(model)}


# ---------------------------------------------------------------------- reparametrised weights


def lstm_of_old() -> nn.Module:
    return nn.utils.weight_norm(nn.utils.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"), "weight_ih_l0")


parametrizations = nn.utils.parametrizations
REPARAMETRISED = {
    "weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(3, 4)), {"weight_g", "weight_v"}),
    "spectral_norm": (lambda: nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), {"weight_orig"}),
    "prune": (lambda: prune.l1_unstructured(nn.Conv1d(3, 4, 3), "weight", 0.5), {"weight_orig"}),
    "lstm": (lstm_of_old, {f"weight_{k}_l0_{s}" for k in ("ih", "hh") for s in "gv"}),
    "new weight_norm": (
        lambda: parametrizations.weight_norm(nn.ConvTranspose2d(3, 4, 3)),
        {"parametrizations.weight.original0", "parametrizations.weight.original1"},
    ),
    "new spectral_norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(3, 4)),
        {"parametrizations.weight.original"},
    ),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(3, 4)), {"parametrizations.weight.original"}),
    "new lstm": (
        lambda: parametrizations.weight_norm(
            parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"), "weight_ih_l0"
        ),
        {f"parametrizations.weight_{k}_l0.original{i}" for k in ("ih", "hh") for i in (0, 1)},
    ),
    "embedding": (lambda: parametrizations.spectral_norm(nn.Embedding(3, 4)), {"parametrizations.weight.original"}),
}


@pytest.mark.parametrize("case", REPARAMETRISED)
@pytest.mark.filterwarnings("ignore")
def test_a_model_whose_layers_are_all_reparametrised_is_told_so(case: str) -> None:
    make, sources = REPARAMETRISED[case]
    model = nn.Sequential(nn.BatchNorm1d(3), make(), nn.ReLU())
    message = r"the weights of all supported layers are reparametrised\. In each .*1\.{}.*remove_parametrizations"
    for name in sources:
        with pytest.raises(ValueError, match=message.format(name.replace(".", r"\."))):
            select(model)
        with pytest.raises(
            ValueError, match=r"can be sparse\. Candidates: none.* What it matches stays dense: reparam"
        ):
            select(model, include=(f"1.{name}",))
    with pytest.raises(ValueError, match="of all supported layers are reparametrised"):
        RigL(0.5).plan(model)


@pytest.mark.parametrize("case", REPARAMETRISED)
@pytest.mark.filterwarnings("ignore")
def test_beside_plain_layers_what_weights_are_computed_from_stays_dense(case: str) -> None:
    make, sources = REPARAMETRISED[case]
    model = nn.Sequential(make(), nn.Linear(4, 4))
    found = reasons(model)
    assert [n for n, r in found.items() if not r] == ["1.weight"]
    assert {n for n, r in found.items() if r == "reparametrised: not a plain weight"} == {f"0.{n}" for n in sources}
    model[1].requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"why each stays dense: 1\.weight \(frozen .*In each forward pass a weight is"
    ):
        select(model)


def test_names_that_only_look_like_those_of_reparametrisations_are_plain() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value_v, self.original_v = nn.Linear(3, 3), nn.Parameter(torch.zeros(3, 3))

    found = reasons(Named())
    assert found["value_v.weight"] == ""
    assert found["original_v"] == "not a weight of a supported layer (Named)"


# ---------------------------------------------------------------------- types


OTHER_TYPES = [torch.complex64, torch.complex128, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", OTHER_TYPES, ids=str)
def test_weights_that_are_no_real_floating_point_numbers_are_left_out_with_their_type(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Embedding(3, 3), nn.Conv2d(3, 3, 3), nn.Linear(3, 3))
    for layer in model[:3]:
        layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=dtype.is_complex)
    name = str(dtype).removeprefix("torch.")
    expected = f"{name}: only weights in float16, bfloat16, float32 and float64 become sparse"
    assert reasons(model) | {"0.bias": "", "2.bias": "", "3.bias": ""} == {
        **dict.fromkeys(["0.weight", "1.weight", "2.weight"], expected),
        **dict.fromkeys(["0.bias", "2.bias", "3.bias", "3.weight"], ""),
    }
    with pytest.raises(ValueError, match=r"include=\['0\.\*'\] matches no parameter .*Candidates: 3\.weight\."):
        select(model, include=("0.*",))
    with pytest.raises(ValueError, match=rf"no parameter is left .*0\.weight \({name}: only weights in float16"):
        select(model, exclude=("3.weight",))


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_are_left_out_with_their_type() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    codes = torch.quantize_per_tensor(model[0].weight.detach(), 0.1, 0, torch.qint8)
    model[0].weight = nn.Parameter(codes, requires_grad=False)
    assert reasons(model)["0.weight"] == "qint8: only weights in float16, bfloat16, float32 and float64 become sparse"


# ---------------------------------------------------------------------- adapters


class Adapted(nn.Module):
    """A frozen layer and two small ones beside it, as LoRA libraries put them."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def adapted() -> nn.Module:
    return nn.Sequential(Adapted(nn.Linear(12, 24)), nn.ReLU(), Adapted(nn.Linear(24, 4)))


class Module(pl.LightningModule):
    def __init__(self, model: nn.Module, trained: Any = None) -> None:
        super().__init__()
        self.model = model
        self.trained = trained

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.model, batch)

    def configure_optimizers(self) -> Any:
        return sgd([p for p in (self.trained or self.model).parameters() if p.requires_grad])


SIZES = "Of 512 weights that could be sparse 384 are not trained and stay dense. The other 128 become sparse"


def printed(capsys: pytest.CaptureFixture[str], callback: SparsityCallback, module: Module) -> str:
    trainer_for(callback, max_epochs=1).fit(module, data())
    return capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_the_plan_says_that_adapters_become_sparse_and_what_they_adapt_stays_dense(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for callback in (Static(0.5), GMP(0.5, distribution="uniform", every=2)):
        text = printed(capsys, callback, Module(adapted()))
        assert f"{SIZES}; where they are adapters, as in LoRA, the network that they adapt stays dense." in text
    assert SIZES in str(Static(0.5).plan(adapted()))
    model = adapted()
    with sparsify(Static(0.5), model, sgd([p for p in model.parameters() if p.requires_grad]), steps=4):
        assert SIZES in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_layers_in_no_optimizer_count_as_not_trained(capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4))
    text = printed(capsys, Static(0.5), Module(net, trained=net[2]))
    assert "Of 384 weights that could be sparse 288 are not trained and stay dense. The other 96 become sparse" in text


def test_a_plan_in_which_most_weights_are_trained_needs_no_such_word() -> None:
    net = nn.Sequential(nn.Embedding(900, 12), nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24))
    net[1].requires_grad_(False)
    assert Static(0.5).plan(net).note == ""
    assert "not trained" not in str(Static(0.5).plan(net))
