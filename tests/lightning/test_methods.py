"""Each method is a callback: two lines, with the method's own signature and help, and few public names."""

import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.demos.boring_classes import BoringModel

import sparse_callbacks
from sparse_callbacks import SparsityCallback, methods
from sparse_callbacks.core.constructors import argument_names
from sparse_callbacks.core.hooks import Hooks
from sparse_callbacks.core.method import Method, Options
from sparse_callbacks.lightning import methods as callbacks

# without a method that it is around
MADE_ALONE = [name for name in methods.__all__ if name != "SupTickets"]
ROOT = Path(__file__).parent.parent.parent


def callback_of(name: str) -> Any:
    return getattr(sparse_callbacks, name)


@pytest.mark.parametrize("name", MADE_ALONE)
def test_a_callback_is_its_method_with_a_host(name: str) -> None:
    plain, callback = getattr(methods, name), callback_of(name)
    assert issubclass(plain, Method)
    assert not issubclass(plain, SparsityCallback)
    assert callback.__bases__[0] is plain
    assert issubclass(callback, SparsityCallback)
    assert set(vars(callback)) <= {
        "__module__",
        "__doc__",
        "__annotations__",
        "__static_attributes__",
        "__firstlineno__",
    }
    assert inspect.signature(callback) == inspect.signature(plain)
    assert callback.__doc__ == plain.__doc__
    assert callback().arguments == plain().arguments
    assert repr(pickle.loads(pickle.dumps(callback()))) == repr(plain())
    assert callback.__name__ == name
    assert getattr(callbacks, name) is callback


@pytest.mark.parametrize("name", MADE_ALONE)
@pytest.mark.parametrize("listed", [True, False])
def test_a_trainer_says_what_to_give_it_instead_of_a_plain_method(name: str, listed: bool) -> None:
    made = getattr(methods, name)()

    def fit() -> None:
        trainer = pl.Trainer(callbacks=[made] if listed else made, logger=False, accelerator="cpu")
        trainer.fit(BoringModel())

    with pytest.raises((TypeError, AttributeError), match=f"Give the Trainer the callback: sparse_callbacks.{name}"):
        fit()


def test_other_names_that_a_method_lacks_are_missing_as_usual() -> None:
    with pytest.raises(AttributeError, match="'RigL' object has no attribute 'every_so_often'"):
        _ = methods.RigL().every_so_often


# what an author overrides or reads; docs/writing_a_method.md explains it
INTERFACE = """
    schedulable published_every arrives_at_stop first_update keeps_dense reads_dense_gradients plans_counts
    figure_prefix explores weights_in_step

    attach further_members initial_masks start_copies wants_dense_gradients before_step after_step new_masks new_weights
    after_update write rehearse begin_training window_start batch_start batch_end epoch_start validation_end epoch_end
    make_calendar grow_scores fraction_at

    weights params masks targets aux owners progress times model host generator planned_zeros own_figures set_times

    target_sparsity at_target figures outcome
"""
# what is there for users and for the engine
OTHERS = """
    plan measured_sparsity shortfall step updates fraction arguments attachment calendar engine entries fit_state
    parameter_zeros saved share_out
"""


def test_few_names_are_public() -> None:
    made = sparse_callbacks.RigL()
    lightnings = {
        n for base in type(made).__mro__ if base.__module__.split(".")[0] != "sparse_callbacks" for n in vars(base)
    }
    arguments = argument_names(type(made), Options)
    public = {n for n in dir(made) if not n.startswith("_")} - lightnings - set(arguments)
    interface, others = set(INTERFACE.split()), set(OTHERS.split())
    assert public == interface | others
    assert len(interface) <= 50
    assert len(others) <= 15
    assert {n for n in vars(Hooks) if not n.startswith("_")} <= interface


# rules of a base that these have another argument for, or whose arguments they do not take
ELSEWHERE = "every start stop initial_mask rescale reinit_after storage pattern group rows"
# what a loop asks of a method that starts optimizers anew
LIVES = (
    "begin_optimizer_life horizon horizon_asked optimizer_life restarts shortest_life with_restarts without_restarts"
)


@pytest.mark.parametrize("name", ["PruneAtStart", "EarlyCroP"])
def test_methods_that_prune_once_have_no_public_names_of_their_own(name: str) -> None:
    made = getattr(methods, name)()
    public = {n for n in dir(made) if not n.startswith("_")} - set(argument_names(type(made), Options))
    assert public <= {*INTERFACE.split(), *OTHERS.split(), *ELSEWHERE.split(), *LIVES.split()}


def test_core_and_methods_work_where_lightning_cannot_be_imported() -> None:
    program = """
import sys
blocked = ("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "hydra", "wandb")
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is not installed")
sys.meta_path.insert(0, Blocked())
import torch
import sparse_callbacks, sparse_callbacks.core, sparse_callbacks.methods, sparse_callbacks.channels
from sparse_callbacks import sparsify, schedules, distributions, ops, combine, Plan, slim, channel_groups
from sparse_callbacks.methods import RigL
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
with sparsify(RigL(0.5, every=2, print_plan=False), model, optimizer, 8) as run:
    for _ in range(8):
        model(torch.ones(4, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
assert run.updates == 3, run.updates
try:
    sparse_callbacks.RigL
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "use sparse_callbacks.methods.RigL with sparse_callbacks.sparsify" in done.stdout, done.stderr


def test_the_root_lists_its_names_and_knows_no_other() -> None:
    assert set(sparse_callbacks.__all__) <= set(dir(sparse_callbacks))
    for name in sparse_callbacks.__all__:
        assert getattr(sparse_callbacks, name) is not None
    with pytest.raises(AttributeError, match="module 'sparse_callbacks' has no attribute 'Rigl'"):
        _ = sparse_callbacks.Rigl
