"""Flax NNX: its modules as guests, and as a host."""

from .guest import NnxGuest
from .host import ToNNX
from .models import Models

guest = NnxGuest
host = ToNNX
whole = Models()

__all__ = ["ToNNX", "guest", "host", "whole"]
