"""Sana's network with hand-written tangents."""
