"""The pieces of `benchmarks/gpu.py`: each is a process of its own, with its own time limit (docs/gpu.md)."""
