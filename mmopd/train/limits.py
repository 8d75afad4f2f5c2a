"""Sizes that the trainer computes by and that `mmopd plan` counts with. Nothing here needs torch."""

# Columns of logits that exist at once, for up to 2,048 rows: 4 MiB of them stay in a CPU's cache, which saves a quarter
# of the time.
GPU_CHUNK, CPU_CHUNK = 4096, 512
ROWS = 64  # rows of logits that exist at once where several log-probs of each are asked for
# Flash attention gets the keys of a prompt once for each response: at most this many for each token of a tree, which
# bounds their memory.
KEYS = 8
# A weight of up to this many numbers stays gathered between micro-steps: norms and biases of a real model, nearly all
# of a tiny one, where it saves a quarter of the CPU time of four micro-steps.
RESIDENT = 1_000_000
