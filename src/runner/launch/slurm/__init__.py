"""The launcher for Slurm, through submitit."""
