"""Properties that hold in every run: random networks, methods, arguments, optimizers and hosts."""
