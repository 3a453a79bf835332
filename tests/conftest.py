"""Puts this folder on the import path, so that tests in subfolders find the helper modules; one thread for
everything."""

import os

# the networks are tiny: two threads gain nothing, and on a busy machine they wait for each other most of the time
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
