"""What every process of a run stands on: child processes, ranks, run folders, locks, progress, addresses."""
