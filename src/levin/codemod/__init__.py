"""Rewriting programs that were written for Lightning: the tool behind ``levin migrate``."""
