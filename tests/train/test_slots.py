import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from phyxdream.errors import ConfigError
from phyxdream.train import metrics
from phyxdream.train.slots import (
    SlotsConfig,
    SlotTrainer,
    curve_figure,
    learning_rate,
    train_slots,
    unevenness,
)

TINY = SlotsConfig(
    steps=5, batch_size=4, log_every=2, held_out=6, size=16, slots=4, slot_size=8, hidden_size=8, depth=4, layers=2,
    token_size=8, decoder_size=8, device="cpu", quiet=True,
)  # fmt: skip
SCORES = ("FG-ARI", "ARI", "mask IoU", "slots used", "sharpness", "loss/held-out")


def test_everything_is_written_and_agrees(tmp_path):
    config = replace(TINY, out=str(tmp_path / "run"))
    result = train_slots(config)
    assert (result.path, result.steps, result.signal) == (tmp_path / "run", 5, None)
    rows = metrics.read(result.path / "metrics.jsonl")
    assert rows["step"].tolist() == [0, 2, 4, 5]
    scores = json.loads((result.path / "scores.json").read_text())
    for name in SCORES:
        assert scores[name] == result.scores[name] == rows[name][-1]
    stored = json.loads((result.path / "config.json").read_text())
    assert stored["slots"] == 4 and stored["environment"]["torch"] == torch.__version__
    for name in ("curve.png", "slots.png"):
        assert (result.path / name).read_bytes().startswith(b"\x89PNG")
    trained = SlotTrainer(config)
    assert trained.score() != result.scores
    trained.model.load_state_dict(load_file(result.path / "model.safetensors"))
    assert trained.score() == pytest.approx(result.scores)


def test_same_seed_same_run(tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        state = torch.random.get_rng_state()
        result = train_slots(replace(TINY, seed=seed, out=str(tmp_path / name)))
        assert torch.equal(torch.random.get_rng_state(), state)
        rows = metrics.read(result.path / "metrics.jsonl")
        runs.append([rows[name][1:].tolist() for name in (*SCORES, "loss/training")])
    assert runs[0] == runs[1] != runs[2]


def test_held_out_scenes_are_the_same_for_all_seeds_and_never_learned_from():
    one, other = SlotTrainer(TINY), SlotTrainer(replace(TINY, seed=1))
    assert np.array_equal(one.held_out["image"], other.held_out["image"])
    assert not torch.equal(one.batch(0), other.batch(0))
    same_size = SlotTrainer(replace(TINY, batch_size=TINY.held_out))
    assert not np.array_equal(same_size.scenes.batch(0)["image"], same_size.held_out["image"])


def test_steps_lower_the_loss_of_a_fixed_batch():
    trainer = SlotTrainer(replace(TINY, steps=1000, learning_rate=1e-2))
    image = trainer.batch(0)
    losses = [float(trainer.step(image)) for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_balance_lets_no_slot_take_more_than_its_share():
    excess = []
    for weight in (0.0, 4e4):
        trainer = SlotTrainer(replace(TINY, steps=1000, learning_rate=1e-2, balance=weight))
        with torch.no_grad():  # slots that differ from the start
            trainer.model.encoder.attention.initial_log_std.fill_(1.0)
            trainer.model.decoder.out.weight.mul_(5)
        for _ in range(40):
            trainer.step(trainer.batch(0))
        excess.append(trainer.explain()[0].masks.mean((-2, -1)).max(-1).mean() - 1 / TINY.slots)
    assert 0 < excess[1] < 0.3 * excess[0]


def test_slots_start_alike_at_every_score():
    trainer = SlotTrainer(TINY)
    assert trainer.score() == trainer.score()


def test_learning_rate_rises_stays_and_falls():
    config = SlotsConfig(steps=1000, learning_rate=1.0)
    rates = np.array([learning_rate(config, step) for step in range(1000)])
    assert rates[0] == pytest.approx(0.01)
    assert (np.diff(rates[:100]) > 0).all() and (rates[99:751] == 1).all() and (np.diff(rates[750:]) < 0).all()
    assert rates[-1] == pytest.approx(1 / 250)
    assert 0 < learning_rate(replace(config, steps=1), 0) <= 1


def test_unevenness():
    even, one = torch.full((2, 4, 16, 32), 0.25), torch.zeros(2, 4, 16, 32)
    one[:, 1] = 1
    assert unevenness(even) == pytest.approx(0.5 / 4) and unevenness(one) == pytest.approx(0.5)


def test_interrupt_saves(tmp_path, monkeypatch):
    step = SlotTrainer.step

    def interrupted(trainer, image):
        if trainer.steps == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, image)

    monkeypatch.setattr(SlotTrainer, "step", interrupted)
    result = train_slots(replace(TINY, steps=1000, log_every=100, out=str(tmp_path / "run")))
    assert (result.steps, result.signal) == (3, signal.SIGINT)
    assert metrics.read(result.path / "metrics.jsonl")["step"].tolist() == [0, 3]
    assert json.loads((result.path / "scores.json").read_text())["steps"] == 3
    assert load_file(result.path / "model.safetensors")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="the loss became"):
        train_slots(replace(TINY, steps=50, learning_rate=1e30, out=str(tmp_path / "run")))


def test_bad_options_are_named(tmp_path):
    for options in (
        dict(seed=-1),
        dict(held_out=0),
        dict(learning_rate=0.0),
        dict(balance=-1.0),
        dict(sprites=(2, 1)),
        dict(stride=0),
    ):
        with pytest.raises(ConfigError, match=next(iter(options))):
            train_slots(replace(TINY, out=str(tmp_path / "run"), **options))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"out: .* not empty"):
        train_slots(replace(TINY, out=str(tmp_path)))
    with pytest.raises(ConfigError, match="out: cannot write"):
        train_slots(replace(TINY, out=str(tmp_path / "notes.txt")))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_curves_of_several_runs():
    columns = {"step": np.arange(3.0), "FG-ARI": np.zeros(3), "mask IoU": np.ones(3), "loss/held-out": np.ones(3)}
    figure = curve_figure({"seed 0": columns, "seed 1": columns})
    assert [len(axes.lines) for axes in figure.axes] == [2, 2, 2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["seed 0", "seed 1"]
