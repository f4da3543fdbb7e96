"""The demo page: see a model think, in a browser."""
