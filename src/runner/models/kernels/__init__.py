"""Make a loaded model faster or smaller: attention, LoRA, LM head, activation checkpointing, torch.compile."""
