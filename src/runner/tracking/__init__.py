"""Run folders: their files, their status, how to find them, and their upload to MLflow."""
