"""Checkpoints: the tree that is saved, and the files it lies in."""
