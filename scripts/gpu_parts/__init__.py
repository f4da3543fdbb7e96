"""The parts of scripts/gpu.py, each a process of its own."""
