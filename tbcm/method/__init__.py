"""The mathematics of TBCM: pure tensor functions, no input or output, no configuration, no distribution."""
