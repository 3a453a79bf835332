"""The command ``python -m sparse_callbacks.compare``: runs side by side, as a page, Markdown and CSV."""

from sparse_callbacks.reporting.comparison_command import compare_main

if __name__ == "__main__":
    compare_main()
