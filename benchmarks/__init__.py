"""Benchmarks, and ``python -m benchmarks``, which runs those that measure speed."""
