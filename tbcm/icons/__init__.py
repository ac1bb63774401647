"""The embedded stand-in teacher: text-to-image for icons at 64 px, and the recipes that made it."""
