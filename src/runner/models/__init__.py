"""Models: load, quantize, adapt (PEFT), save."""
