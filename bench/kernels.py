"""Time of each fused operator: see `operators.py`, which holds the code.

This file imports nothing unless it is run: Transformers takes any module called `kernels` on the path for a package of
that name, and imports it.
"""

if __name__ == "__main__":
    import sys

    from speed.operators import main

    sys.exit(main())
