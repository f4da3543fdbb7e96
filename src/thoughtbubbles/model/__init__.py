"""The model: streams, gates, attention and all that follows from them."""
