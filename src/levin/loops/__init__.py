"""The loops: fit, evaluate and predict, as plain functions over a Run."""
