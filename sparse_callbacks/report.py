"""The command ``python -m sparse_callbacks.report``: pages of recorded runs."""

from sparse_callbacks.reporting.report_command import main

if __name__ == "__main__":
    main()
