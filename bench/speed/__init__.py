"""Time and memory: arms of a training step, and how they are measured."""
