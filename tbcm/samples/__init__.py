"""Training samples: the teacher's trajectories, or noised images."""
