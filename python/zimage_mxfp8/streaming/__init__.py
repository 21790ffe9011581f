"""Work on checkpoints that are larger than memory: jobs, rows of tensors, sums of errors."""
