"""Agents of the Dreamer family."""

from phyxdream.agents.config import PRESETS, SIZES, DreamerConfig, preset
from phyxdream.agents.daydreamer import DayDreamer
from phyxdream.agents.dreamer import Carry, DreamerAgent, Update
from phyxdream.agents.dreamer_v1 import DreamerV1
from phyxdream.agents.dreamer_v2 import DreamerV2
from phyxdream.agents.dreamer_v3 import DreamerV3
from phyxdream.agents.dreaming import Dreaming, DreamingV2
from phyxdream.agents.phyxdream import PhyXDreamer, Planning
from phyxdream.agents.planet import PlaNet
from phyxdream.agents.planner import Planner
from phyxdream.agents.world_models import WorldModels

__all__ = [
    "PRESETS",
    "SIZES",
    "Carry",
    "DayDreamer",
    "DreamerAgent",
    "DreamerConfig",
    "DreamerV1",
    "DreamerV2",
    "DreamerV3",
    "Dreaming",
    "DreamingV2",
    "PhyXDreamer",
    "PlaNet",
    "Planner",
    "Planning",
    "Update",
    "WorldModels",
    "preset",
]
