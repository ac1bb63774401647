"""How good students are: distances between sets of images, alignment with text, agreement with the teacher, speed."""

METRICS = ("distance", "text", "agreement", "speed")
"""What `python -m tbcm.evaluate` measures; its --help says how."""
