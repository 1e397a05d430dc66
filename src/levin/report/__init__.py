"""The page of a run: what ran and how it went, in one file of HTML that needs nothing else."""
