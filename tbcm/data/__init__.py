"""What a run reads: prompts and cached embeddings; latents for the baselines only."""
