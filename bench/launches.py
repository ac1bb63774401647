"""What a call of a fused operator costs the host: see `speed/launches.py`, which holds the code."""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[:0] = [str(Path(__file__).resolve().parent.parent / folder) for folder in (".", "kernels", "tests")]
    if not Path("/dev/nvidiactl").exists():  # before torch is imported
        from pretended_cuda import compile_device, pretend

        pretend(compile_device())
        from pretended_launches import compile_nothing, pretend_launches

        pretend_launches()
        if "--block" in sys.argv:
            compile_nothing()

    from speed.launches import main

    sys.exit(main())
