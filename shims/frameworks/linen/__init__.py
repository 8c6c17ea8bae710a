"""Flax Linen: its modules as guests, and as a host."""

from .guest import LinenGuest
from .host import ToLinen
from .models import Models

guest: type[LinenGuest] = LinenGuest
host: type[ToLinen] = ToLinen
whole: Models = Models()

__all__ = ["ToLinen", "guest", "host", "whole"]
