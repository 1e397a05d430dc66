"""Going on exactly: the place in the data and in the run, kept in a checkpoint and found again."""
