"""Turn responses with advantages into better weights: packing, log-probs, DeepSpeed ZeRO-3, checkpoints, export."""
