"""Loaders: combined, sampled for many ranks, fed to the loops, and remembered where they are."""
