"""What the processes of a run agree on: stops, uneven data, who hangs, where each of them is."""
