"""From responses with advantages to better weights: packing, log-probs, DeepSpeed ZeRO-3, checkpoints, export."""
