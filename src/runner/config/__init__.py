"""Configuration: compose it with Hydra, bind options to their functions, and check all of it."""
