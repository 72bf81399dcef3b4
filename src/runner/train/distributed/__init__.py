"""Several processes: process group, DDP, FSDP."""
