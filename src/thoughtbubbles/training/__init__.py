"""Training: recipes and runs of the transformers Trainer."""
