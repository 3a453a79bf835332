"""Rows of the table about linear layers that hold their live weights alone."""

from pathlib import Path

from support.methods import CONTRACTS
from support.processes import matrices

from compatibility.cells import feature, resumes
from sparse_callbacks.testing.networks import Classifier


@feature("storage", "storage=sparse and grouped")
def exchanged(name: str, folder: Path) -> None:
    """Layers are exchanged, and a run with them resumes exactly; a method that takes no storage says why."""
    for storage in ("sparse", "grouped"):
        arguments = {"storage": storage, "group": 4}
        contract = CONTRACTS[name]()
        contract.callback_class(**{**contract.settings.arguments, **arguments})
        resumes(name, lambda: Classifier(matrices(0)), folder / storage, arguments=arguments)
