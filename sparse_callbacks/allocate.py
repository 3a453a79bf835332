"""The command ``python -m sparse_callbacks.allocate``: how sparse each layer becomes within a budget."""

from sparse_callbacks.methods.spdy.command import main

if __name__ == "__main__":
    main()
