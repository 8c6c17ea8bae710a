"""Equinox: its modules as guests, and as a host."""

from .guest import EquinoxGuest
from .host import ToEquinox
from .models import Models

guest: type[EquinoxGuest] = EquinoxGuest
host: type[ToEquinox] = ToEquinox
whole: Models = Models()

__all__ = ["ToEquinox", "guest", "host", "whole"]
