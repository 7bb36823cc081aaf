"""Benchmarks, installed as kdfast.benchmarks: what is fast, against whom, and how far from the floor."""
