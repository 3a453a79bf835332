"""Methods whose optimizers and learning rate schedules start anew within a run."""

from typing import ClassVar

from sparse_callbacks.core.calendar import RunLength


class RestartsOptimizers:
    """A method whose optimizers and schedules live for a phase of the run and not for all of it.

    It asks for new ones with :meth:`~sparse_callbacks.core.host.Host.request_restart`; the host calls
    :meth:`begin_optimizer_life` right before it configures them, and :meth:`optimizer_life` where the user's code asks
    how long they will live (:func:`sparse_callbacks.horizon`).
    """

    with_restarts: ClassVar[str] = "restart=True"
    """The argument that lets optimizers start anew, for errors."""
    without_restarts: ClassVar[str] = "restart=False"
    """The argument with which optimizers live as long as the run, for errors."""
    horizon_asked: bool = False
    """The user's code has asked how long its optimizers live, so its schedules are not of one fixed length."""

    @property
    def restarts(self) -> bool:
        """Whether optimizers are configured anew at all; False where the user has switched it off."""
        raise NotImplementedError

    @property
    def horizon(self) -> float | None:
        """Optimizer steps that the current optimizers live; None where they are never configured anew."""
        raise NotImplementedError

    @property
    def shortest_life(self) -> float | None:
        """Optimizer steps of the shortest :attr:`horizon` of the run.

        None where optimizers are never configured anew.
        """
        raise NotImplementedError

    def optimizer_life(self, run: RunLength) -> float | None:
        """:attr:`horizon`, also before the run has begun.

        Args:
            run: the length of the run.
        """
        raise NotImplementedError

    def begin_optimizer_life(self) -> None:
        """The host is about to configure new optimizers."""
        raise NotImplementedError
