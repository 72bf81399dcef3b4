"""``launcher=slurm``: submit runs to Slurm with submitit."""
