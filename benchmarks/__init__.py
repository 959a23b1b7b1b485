"""Benchmarks of aft: `python -m benchmarks` lists them."""
