import json

import numpy as np
import pytest
import torch
from rich.console import Console

from phyxdream.agents import DreamerAgent, preset
from phyxdream.errors import ConfigError
from phyxdream.train.open_loop import open_loop_error, open_loop_table, play, write_open_loop
from phyxdream.train.run import Run


@pytest.fixture
def agent(tiny):
    tiny.env, tiny.image_size = "gym:phyxdream/Sprites-v0", 16
    return DreamerAgent(tiny)


def test_episodes_with_their_masks(agent):
    batch, truth = play(agent, 3, length=9, segmentation=True)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "image": (9, 3, 3, 16, 16), "action": (9, 3), "is_first": (9, 3),
    }  # fmt: skip
    assert truth.shape == (9, 3, 16, 16) and set(np.unique(truth)) <= {0, 1, 2, 3}
    assert batch["is_first"][0].all() and not batch["is_first"][1:].any()
    red = batch["image"][:, :, 0].int() - batch["image"][:, :, 1].int()
    assert (red.numpy()[truth == 2] > 100).mean() > 0.8
    again, _ = play(agent, 3, length=9, segmentation=True)
    assert all(torch.equal(again[name], value) for name, value in batch.items())
    # Episodes end after fifty steps; what is shown ends there.
    assert len(play(agent, 1, length=99, segmentation=True)[1]) == 51


def test_an_environment_without_masks(tiny):
    batch, truth = play(DreamerAgent(tiny), 2, length=4, segmentation=True)
    assert truth is None and batch["is_first"].shape == (4, 2)


def test_random_episodes_are_the_same_for_every_agent(agent, tiny):
    """Agents are compared by them."""
    tiny.seed, tiny.deter_size = 5, 32
    batches = [play(a, 2, 12, seed=3, random=True)[0] for a in (agent, DreamerAgent(tiny))]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
    assert len(batches[0]["action"].unique()) > 1
    assert not torch.equal(play(agent, 2, 12, seed=4, random=True)[0]["image"], batches[0]["image"])


@pytest.mark.parametrize("mode", [None, "embed", "per_slot"])
def test_errors_are_those_of_the_predictions(tiny, mode):
    """A decoder that paints one grey errs by the distance to it, whatever the latent state."""
    slots = dict(slot_mode=mode, slots=2, slot_size=8, slot_depth=4, slot_layers=1, slot_message_size=4)
    small = {
        k: getattr(tiny, k) for k in ("size", "deter_size", "hidden_size", "stoch_size", "classes", "units", "depth")
    }
    name = "phyxdream" if mode else "dreamer_v3"
    agent = DreamerAgent(preset(name, **small, **(slots if mode else {}), env="gym:phyxdream/Sprites-v0", num_envs=2))
    model = agent.model.world_model
    decoder = model.decoder

    class Grey(torch.nn.Module):
        def forward(self, feature):
            distribution = decoder(feature)["image"]
            distribution.prediction = torch.full_like(distribution.mode, 0.5)
            return {"image": distribution}

    model.decoder = Grey()
    error = open_loop_error(agent, sequences=2, length=9, context=4, seed=1)["image"]
    truth = play(agent, 2, 9, seed=1, random=True)[0]["image"].double() / 255
    away = (truth - 0.5).square().mean((1, 2, 3, 4)).numpy()
    frozen = (truth - truth[3]).square().mean((1, 2, 3, 4)).numpy()
    np.testing.assert_allclose(error.filtered, away, rtol=1e-5)
    np.testing.assert_allclose(error.open_loop, away, rtol=1e-5)
    np.testing.assert_allclose(error.frozen, frozen, rtol=1e-5, atol=1e-9)
    assert error.ahead(2) == pytest.approx((away[5], away[5], frozen[5]), rel=1e-5)


def test_shown_steps_are_filtered_and_the_others_imagined(agent):
    error = open_loop_error(agent, sequences=2, length=12, context=4)["image"]
    np.testing.assert_array_equal(error.filtered[:4], error.open_loop[:4])
    assert (error.filtered[4:] != error.open_loop[4:]).all()
    assert error.frozen[3] == 0 and len(error.filtered) == 12
    again = open_loop_error(agent, sequences=2, length=12, context=4)["image"]
    np.testing.assert_array_equal(again.open_loop, error.open_loop)


def test_vectors_too_and_short_episodes_are_a_sentence(tiny):
    agent = DreamerAgent(tiny)  # CartPole
    (error,) = open_loop_error(agent, sequences=2, length=8).values()
    assert error.open_loop.shape == (8,)
    with pytest.raises(ConfigError, match=r"over after .* of which 500 are shown"):
        open_loop_error(agent, sequences=2, length=600, context=500)
    for wrong in ("sequences", "length", "context"):
        with pytest.raises(ConfigError, match=wrong):
            open_loop_error(agent, **{wrong: 0})


def test_table_and_file(agent, tmp_path):
    errors = open_loop_error(agent, sequences=2, length=17, context=5)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(open_loop_table(errors))
    lines = console.export_text().splitlines()
    assert "after 5 steps shown" in lines[0] and [line.split()[-4] for line in lines[2:5]] == ["1", "5", "10"]
    assert f"{errors['image'].open_loop[5]:.3g}" in lines[2] and len(lines) == 5
    run = Run.create(tmp_path / "run", {"env": "x"})
    write_open_loop(run, 7, errors)
    found = json.loads((run.path / "open_loop.json").read_text())
    assert found["step"] == 7 and found["errors"]["image"]["context"] == 5
    assert found["errors"]["image"]["open_loop"] == pytest.approx(errors["image"].open_loop.tolist())
