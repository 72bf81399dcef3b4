"""Trackers besides MLflow (``tracking.also``), which get the records of a run from the process that uploads it."""
