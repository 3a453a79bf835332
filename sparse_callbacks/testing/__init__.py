"""The contract for methods, as pytest cases: ``TestMine = contract(Mine, Settings(arguments))``."""

from sparse_callbacks.testing.contract import contract
from sparse_callbacks.testing.settings import PROMISES, Settings

__all__ = ["PROMISES", "Settings", "contract"]
