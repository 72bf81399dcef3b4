"""The run folder: its files, its status, how to find it."""
