import os

import torch

# Before any test starts a process: the machine's few cores are shared by servers, ranks and the tests themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
