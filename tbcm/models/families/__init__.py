"""Backbones: what is peculiar to each diffusers pipeline class, as one row of facts each (see `rows`)."""
