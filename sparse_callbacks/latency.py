"""The command ``python -m sparse_callbacks.latency``, and ``measure``: latency tables of this machine."""

from sparse_callbacks.channels.latency.command import main
from sparse_callbacks.channels.latency.measure import measure as measure

if __name__ == "__main__":
    main()
