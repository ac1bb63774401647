"""What a run reads: prompts."""
