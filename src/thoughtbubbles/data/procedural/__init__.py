"""Procedural tasks: generated questions with computed answers, by difficulty.

They need several steps or several look-ups for one token, which is what forks claim to give, and small models learn
them on a CPU.
"""
