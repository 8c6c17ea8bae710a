"""Layers that a framework lacks, one file a framework: real modules, usable by themselves."""
