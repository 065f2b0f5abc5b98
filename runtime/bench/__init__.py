"""Benchmarks as library code; `apar bench` and scripts are thin over it. Every result is a JSON-like mapping."""
