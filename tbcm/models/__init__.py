"""Networks: backbones with tangents, text encoders, loading."""
