"""The category of the doctor's warnings, and how a user switches one of them off."""


class DoctorWarning(UserWarning):
    """A run will do less than its user expects, for a reason that was measured. Each is given once in a run.

    Its text begins with ``doctor/`` and the name of the check, by which a single one can be switched off.

    Example:
        >>> import warnings
        >>> from sparse_callbacks import DoctorWarning
        >>> warnings.filterwarnings("ignore", message="doctor/slow_optimizer")
        >>> warnings.filterwarnings("ignore", category=DoctorWarning)
    """
