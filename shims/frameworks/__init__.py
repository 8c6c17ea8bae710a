"""One file a framework: its guest side, its host side, or both."""
