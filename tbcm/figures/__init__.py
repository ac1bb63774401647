"""The paper's figures, drawn from any teacher or run: python -m tbcm.figures NAME RUN_OR_TEACHER

A module a figure, each with `make(request) -> Drawing`; `quantities` has the mathematics, `subject` the teacher and its
trajectories, `style` whatever is about drawing and files.
"""

FIGURES = {
    "equivalent-noise": "Fig. 3: the noise that x_t holds (Eq. 8) as images and against t, forward and backward",
    "noise-distribution": "Fig. 8: the same curves, and t-SNE maps of the equivalent noise of many prompts",
    "routes": "Fig. 7: five routes of each strategy, and the density of their times",
    "x0-by-route": "Fig. 9a: the teacher's end point x_0 by strategy, and its error",
    "x0-by-steps": "Fig. 9b: the same by number of route points",
    "brightness": "Fig. 10: end points by their distance to black, and what the brightness filter drops",
    "samples": "Figs. 2, 11, 12: a student in 1, 2 and 4 steps beside its teacher",
    "fid-throughput": "Fig. 1: quality against throughput, from reports of python -m tbcm.evaluate",
}
"""Names, and what --help says of them. The module of `a-b` is `a_b`."""
