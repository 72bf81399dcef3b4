"""Load, quantize, adapt (PEFT) and save models."""
