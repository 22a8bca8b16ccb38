"""The sequence replay buffer, usable on its own."""

from phyxdream.replay.buffer import Replay
from phyxdream.replay.loader import Loader
from phyxdream.replay.selectors import Curious, Limiter, Prioritized, Recency, Uniform
from phyxdream.replay.views import n_step

__all__ = ["Curious", "Limiter", "Loader", "Prioritized", "Recency", "Replay", "Uniform", "n_step"]
