"""Benchmarks, run with `python -m benchmarks`; each prints one JSON object a line."""
