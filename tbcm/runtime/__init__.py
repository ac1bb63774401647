"""What every run needs and no method knows: files, randomness, ranks, optimisers, EMA, checkpoints, logs, signals."""
