"""Trainer: the arguments of a user, and the entry of each call."""

from levin.trainer.trainer import Trainer as Trainer

Trainer.__module__ = __name__  # the path that people type, in messages and pickles too
