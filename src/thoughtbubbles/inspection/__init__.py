"""Looking into models and runs: bubbles and plots."""
