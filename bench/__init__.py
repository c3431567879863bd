"""Benches: `python bench/run.py OP`; `python bench/gpu.py` checks and times everything on a GPU."""
