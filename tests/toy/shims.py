"""Toy as a guest and as a host."""
