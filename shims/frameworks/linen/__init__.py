"""Flax Linen: its modules as guests, and as a host."""

from .guest import LinenGuest
from .host import ToLinen
from .models import Models

guest = LinenGuest
host = ToLinen
whole = Models()

__all__ = ["ToLinen", "guest", "host", "whole"]
