"""The tests. ``models/`` holds what they know about each framework, one file each."""
