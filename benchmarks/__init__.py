"""Benchmarks: ratios of measurements that took turns in one run; ``python -m benchmarks``."""
