"""PhyXDreamer: DreamerV3's behaviour over a world model that sees entities.

    vision        slot attention in the encoder: slots hold features of clusters of pixels
    latent state  `embed`: one RSSM, whose embedding are the ordered slots
                  `per_slot`: an RSSM for each slot with shared weights, and messages between them
    pictures      mixtures of what each slot paints, squared error + λ · absolute error
    heads         read the one feature, or all slots in whatever order

All else, losses, behaviour, replay and optimiser, is `DreamerV3`.
"""

from __future__ import annotations

from collections.abc import Mapping

from phyxdream.agents.dreamer_v3 import DreamerV3
from phyxdream.agents.slot_world_model import SlotWorldModel


class PhyXDreamer(DreamerV3):
    """`DreamerV3` with a `SlotWorldModel`; the arguments are the same, and `config.slot_mode` says which design."""

    def make_world_model(self, shapes: Mapping[str, tuple[int, ...]], action_size: int) -> SlotWorldModel:
        return SlotWorldModel(self.config, shapes, action_size)
