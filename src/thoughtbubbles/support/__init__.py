"""What everything else uses, and what knows of no model."""

VERSION = "0.1.0"
"""Of the package."""
