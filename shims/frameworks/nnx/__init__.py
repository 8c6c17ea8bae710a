"""Flax NNX: its modules as guests, and as a host."""

from .guest import NnxGuest
from .host import ToNNX

guest = NnxGuest
host = ToNNX

__all__ = ["ToNNX", "guest", "host"]
