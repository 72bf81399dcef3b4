"""Start the workers of prepared runs: on this machine, under torchrun, or on Slurm."""
