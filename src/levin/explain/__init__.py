"""The loop of a run laid open: what would be called, in order, read out of the composed run itself."""
