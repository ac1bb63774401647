"""Trained students at work: images from prompts, and pipelines that plain diffusers loads."""
