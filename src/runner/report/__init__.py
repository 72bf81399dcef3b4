"""Results of runs: compare, rank, plot, describe."""
