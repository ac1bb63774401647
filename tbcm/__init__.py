"""tbcm: image-free distillation of text-to-image diffusion teachers into one-step students (TBCM)."""

__version__ = "0.1.0"
