"""Single files, as weights are published, to parts of a diffusers pipeline."""
