"""The command ``python -m sparse_callbacks.convert``: a trained network becomes one of N:M."""

import sys

from sparse_callbacks.core.conversion.convert import convert

if __name__ == "__main__":
    from sparse_callbacks.tasks.convert_command import convert_main

    convert_main()
else:
    # the package has a function of this name, which an import of the module would hide by the module
    sys.modules[__name__] = convert  # type: ignore[assignment]
