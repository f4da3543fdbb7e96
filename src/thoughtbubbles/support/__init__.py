"""What everything else uses, and what knows of no model."""
