"""What a checkpoint is made of, by name: the keys and the version that other frameworks look for, and our own."""

COMPATIBLE_VERSION = "2.6.6"
"""The Lightning version whose file layout is written."""
OWN_KEY = "levin"
"""Where everything lies that Lightning's layout has no place for."""
