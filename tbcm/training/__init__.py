"""Training: the loop, what it reports, and what it would cost."""
