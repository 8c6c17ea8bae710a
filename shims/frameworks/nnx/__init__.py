"""Flax NNX: its modules as guests, and as a host."""

from .guest import NnxGuest
from .host import ToNNX
from .models import Models

guest: type[NnxGuest] = NnxGuest
host: type[ToNNX] = ToNNX
whole: Models = Models()

__all__ = ["ToNNX", "guest", "host", "whole"]
