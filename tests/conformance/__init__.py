"""Grids of layers put to the real systems: ``python -m conformance SUITE`` runs one, ``write`` them all."""
