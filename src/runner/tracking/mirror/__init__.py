"""The process that uploads run folders to MLflow while they are trained."""
