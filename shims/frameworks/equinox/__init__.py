"""Equinox: its modules as guests, and as a host."""

from .guest import EquinoxGuest
from .host import ToEquinox
from .models import Models

guest = EquinoxGuest
host = ToEquinox
whole = Models()

__all__ = ["ToEquinox", "guest", "host", "whole"]
