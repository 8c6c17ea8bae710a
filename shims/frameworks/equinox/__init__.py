"""Equinox: its modules as guests, and as a host."""

from .guest import EquinoxGuest
from .host import ToEquinox

guest = EquinoxGuest
host = ToEquinox

__all__ = ["ToEquinox", "guest", "host"]
