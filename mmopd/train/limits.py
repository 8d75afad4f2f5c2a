"""Size limits of the trainer, which `mmopd plan` counts with too. This module loads no torch."""

# Columns of logits that exist at once, for up to 2,048 rows: 4 MiB of them stay in a CPU's cache, which saves a quarter
# of the time.
GPU_CHUNK = 4096
CPU_CHUNK = 512
ROWS = 64  # rows of logits that exist at once if several log-probs per row are requested
# Flash attention gets a prompt's keys once for each response: this many keys per token of a tree at most, which bounds
# their memory.
KEYS = 8
# A weight of up to this many parameters stays gathered between micro-steps: norms and biases of a real model, and
# nearly all of a tiny one, where this saves a quarter of the CPU time of four micro-steps.
RESIDENT = 1_000_000
