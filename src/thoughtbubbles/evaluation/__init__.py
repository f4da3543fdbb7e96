"""Evaluation: benchmarks, perplexity of left-to-right models and of those that are not, generation."""
