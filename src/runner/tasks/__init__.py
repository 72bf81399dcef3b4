"""Training objectives: encode examples, compute the loss, name the metrics."""
