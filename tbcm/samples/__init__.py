"""Training samples: the teacher's trajectories, or noised images for the baselines."""
