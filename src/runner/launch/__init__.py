"""Start prepared run folders: here, under torchrun, on Slurm."""
