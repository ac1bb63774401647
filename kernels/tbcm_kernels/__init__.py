"""Fused operators for continuous-time consistency training of linear-attention transformers, plain and dual."""
