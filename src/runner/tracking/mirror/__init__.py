"""The separate process that uploads run folders to MLflow while they train."""
