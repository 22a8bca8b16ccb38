import pytest
import torch

from phyxdream import DreamerAgent
from phyxdream.agents import preset
from phyxdream.train.open_loop import play
from phyxdream.train.report_slots import SlotView, slot_panels


@pytest.mark.parametrize(("mode", "initial"), [("embed", "learned"), ("per_slot", "gaussian")])
def test_slots_of_an_agent_are_explained(mode, initial):
    agent = DreamerAgent(
        preset("phyxdream", slot_mode=mode, slot_initial=initial, image_size=16, slots=3, slot_stride=2)
    )
    batch, _ = play(agent, sequences=2, length=7)
    batch["action"] = agent.encode_action(batch["action"])
    model = agent.model.world_model
    for context, frames in ((None, 7), (3, 3)):
        found = model.explain_slots(batch, context, torch.Generator().manual_seed(1))
        view = SlotView.of(found)
        assert view.pictures.shape == (7, 2, 3, 3, 16, 16) and view.attention.shape == (frames, 2, 3, 8, 8)
        torch.testing.assert_close(found.masks.sum(2), torch.ones(7, 2, 16, 16))
        torch.testing.assert_close(found.attention.sum(2), torch.ones(frames, 2, 8, 8))
    made = model.open_loop(batch, 3, torch.Generator().manual_seed(1))["image"]
    torch.testing.assert_close(torch.from_numpy(view.model), made, rtol=1e-4, atol=1e-4)
    assert len(slot_panels(agent)) == 5
