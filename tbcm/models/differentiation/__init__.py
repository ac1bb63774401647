"""The derivative of a network along the trajectory: dual numbers, or `torch.func.jvp`."""
