"""A model served over HTTP: an engine of many rows, and OpenAI's interface to it."""
