"""What a run would cost."""
