"""Grid and hyperparameter search over many runs."""
