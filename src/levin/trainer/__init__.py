"""Trainer: the arguments of a user, and the entry of each call."""

from levin.trainer.trainer import Trainer as Trainer
