"""Looking at checkpoints: what quantisation would cost, and what it did."""
