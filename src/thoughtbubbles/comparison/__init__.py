"""Fair comparison: variants of a recipe, trained on the same data and measured alike."""
