"""From texts to blocks on disk."""
