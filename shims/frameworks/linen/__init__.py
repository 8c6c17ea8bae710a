"""Flax Linen: its modules as guests, and as a host."""

from .guest import LinenGuest
from .host import ToLinen

guest = LinenGuest
host = ToLinen

__all__ = ["ToLinen", "guest", "host"]
