"""Faster computation inside a loaded model: attention, LoRA, LM head, recomputation, torch.compile."""
