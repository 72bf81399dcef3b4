"""Upload of run folders and sweeps to an MLflow store."""
