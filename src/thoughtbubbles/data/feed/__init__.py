"""From prepared blocks and streams to batches."""
