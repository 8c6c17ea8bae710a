"""BrainState: its modules as guests, and as a host."""

from .guest import BrainStateGuest
from .host import FromEquinox, FromLinen, FromNNX, Wrapped

guest = BrainStateGuest
host = Wrapped

__all__ = ["FromEquinox", "FromLinen", "FromNNX", "guest", "host"]
