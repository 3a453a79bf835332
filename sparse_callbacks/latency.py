"""The command ``python -m sparse_callbacks.latency``: measure a latency table on this machine."""

from sparse_callbacks.channels.latency.command import main

if __name__ == "__main__":
    main()
