"""The Trainer's side: the only package, besides ``tasks``, that imports Lightning and uses its private names."""
