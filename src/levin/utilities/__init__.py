"""Seeds, ranks, trees, types, errors and warnings: the ground floor, which imports nothing else of levin's."""
