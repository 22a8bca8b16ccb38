"""PhyXDreamer: DreamerV3's behaviour over a world model that sees entities.

    vision        slot attention in the encoder: slots hold features of clusters of pixels
    latent state  `embed`: one RSSM, whose embedding are the ordered slots
                  `per_slot`: an RSSM for each slot with shared weights, and messages between them
    pictures      mixtures of what each slot paints, squared error + λ · absolute error
    heads         read the one feature, or all slots in whatever order

All else, losses, behaviour, replay and optimiser, is `DreamerV3`. Any behaviour that fits the latent dynamics may take
the place of actor and critic: `Planning` plans.
"""

from __future__ import annotations

from collections.abc import Mapping

from phyxdream.agents.dreamer_v3 import DreamerV3
from phyxdream.agents.learner import PlannerLearner
from phyxdream.agents.slot_world_model import SlotWorldModel
from phyxdream.agents.world_model import WorldModel


class PhyXDreamer(DreamerV3):
    """`DreamerV3` with a `SlotWorldModel`; the arguments are the same, and `config.slot_mode` says which design."""

    def make_world_model(self, shapes: Mapping[str, tuple[int, ...]], action_size: int) -> SlotWorldModel:
        return SlotWorldModel(self.config, shapes, action_size)


class Planning(PlannerLearner):
    """The world model of `PhyXDreamer`, or of `DreamerV3` where there are no slots, learned as it is there, and a
    planner; the arguments are the same."""

    def make_world_model(self, shapes: Mapping[str, tuple[int, ...]], action_size: int) -> WorldModel:
        make = SlotWorldModel if self.config.slot_mode else WorldModel
        return make(self.config, shapes, action_size)

    make_optimizer = DreamerV3.make_optimizer
