"""Simulators that chapters and exercises use: schedulers, CUDA streams, ranks and clocks."""
