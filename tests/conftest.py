"""One thread, as the ranks have: the same sums wherever a test runs, and no fight over a machine's few cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start

import torch

torch.set_num_threads(1)
