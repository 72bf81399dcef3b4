"""Quantization: how the frozen base weights are stored while an adapter trains on them; one file for each library."""
