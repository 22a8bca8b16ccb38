import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from phyxdream.agents import DreamerAgent
from phyxdream.envs.sprites import SpriteScenes
from phyxdream.train import report_slots
from phyxdream.train.report import IMAGINED, SEEN, write_report
from phyxdream.train.report_slots import SlotView, panels, sharpness, sharpness_sheet, slot_panels
from phyxdream.train.run import Run


def oracle(batch, mask, slots, blur=0.0):
    """What a perfect model of sprites would return: slot k paints the k-th segment in its colours."""
    picture = batch["image"].astype(np.float32) / 255
    masks = np.moveaxis(np.eye(slots, dtype=np.float32)[mask], -1, 2)
    masks = masks * (1 - blur) + blur / slots
    pictures = np.repeat(picture[:, :, None], slots, 2)
    tokens = masks[..., ::2, ::2]
    return picture, SimpleNamespace(pictures=pictures, masks=masks, attention=tokens)


@pytest.fixture
def scenes():
    return SpriteScenes(3, 8, size=16, sprites=(2, 3), seed=0).batch(0)


def test_panels_of_a_perfect_model(scenes, tmp_path):
    picture, found = oracle(scenes, scenes["mask"], 5)
    view = SlotView.of(found)
    np.testing.assert_allclose(view.model, picture, atol=1e-6)
    shown = panels(picture, view, view, 3, scenes["mask"])
    assert [panel.title for panel in shown] == [
        "Slots: are they objects?", "Slots over time", "Slots: encoder attention beside decoder alpha",
        "Slots: open-loop prediction", "Slots: open loop against filtered",
    ]  # fmt: skip
    scores = shown[0].content
    assert scores["FG-ARI"] == scores["mask IoU"] == pytest.approx(1) and scores["sharpness"] == pytest.approx(1)
    assert scores["identity switches"] == scores["collapsed"] == 0
    assert isinstance(shown[-1].content, Figure)
    path = write_report(Run.create(tmp_path, {"env": "x"}), extra_panels=shown)
    text = path.read_text()
    assert "could not be drawn" not in text and text.count("data:image/png") == 3
    for words in ("FG-ARI", "identity switches", "sharpness", "white where its mask is not"):
        assert words in text


def test_without_truth_attention_or_open_loop(scenes):
    picture, found = oracle(scenes, scenes["mask"], 5)
    found.attention = None
    shown = panels(picture, SlotView.of(found))
    assert [panel.title for panel in shown] == ["Slots: are they objects?", "Slots over time"]
    assert shown[0].content.keys() == {"slots used", "collapsed", "sharpness"}


def cells(sheet, rows, columns, side, scale):
    """The insides of a sheet's pictures, (rows, columns, side, side, 3); rows by their first pixel."""
    out = np.empty((len(rows), columns, side, side, 3), np.uint8)
    for i, y in enumerate(rows):
        for j in range(columns):
            x = 74 + 4 + j * (side * scale + 8) + 2
            out[i, j] = sheet[y + 2 : y + 2 + side * scale : scale, x : x + side * scale : scale]
    return out


def test_the_sheet_shows_every_slot_in_its_place(scenes):
    picture, found = oracle(scenes, scenes["mask"], 4)
    found.pictures[:, :, 1] = 0  # slot 2 paints black
    view = SlotView.of(found)
    sheet = report_slots.slot_sheet(picture, view, 3, scenes["mask"], sequence=1)
    scale, pitch = 3, 16 * 3 + 4 + 4
    assert sheet.shape == (20 + 8 * pitch + 8, 74 + 8 * pitch + 4, 3)
    tops = [20 + i * pitch for i in range(4)] + [20 + 8 + i * pitch for i in range(4, 8)]
    shown = cells(sheet, tops, 8, 16, scale)
    truth = scenes["image"][:, 1].transpose(0, 2, 3, 1)
    mask = scenes["mask"][:, 1]
    np.testing.assert_array_equal(shown[0], truth)
    np.testing.assert_array_equal(shown[1], np.where((mask == 1)[..., None], 0, truth))
    for k in range(4):
        expected = np.where((mask == k)[..., None], truth * (k != 1), 255)
        np.testing.assert_array_equal(shown[4 + k], expected)
    # Every object has one colour, and so has every slot.
    for row in (2, 3):
        for number in range(4):
            assert len(np.unique(shown[row][mask == number], axis=0)) == 1
    border = sheet[21, [74 + 5 + j * pitch for j in range(8)]]
    np.testing.assert_array_equal(border, [SEEN] * 3 + [IMAGINED] * 5)


def test_attention_lies_beside_alpha(scenes):
    picture, found = oracle(scenes, scenes["mask"], 4)
    found.attention = np.zeros((5, 3, 4, 4, 4), np.float32)  # of the first five steps
    found.attention[:, :, 2, 0] = 1  # slot 3: the upper quarter
    sheet = report_slots.attention_sheet(picture, SlotView.of(found))
    scale, width, pitch = max(1, round(112 / 33) // 2), 33, 16
    y = 20 + (pitch * scale + 4 + 12) + 2 * (pitch * scale + 4 + 4) + 2
    pair = sheet[y : y + 16 * scale : scale, 80 : 80 + width * scale : scale].astype(int).sum(-1)
    assert (pair[:4, :16] > 600).all() and (pair[4:, :16] < 30).all()
    np.testing.assert_array_equal(pair[:, 17:] > 300, scenes["mask"][0, 0] == 2)


@pytest.mark.parametrize(("shape", "slots"), [((1, 1, 5, 6), 1), ((2, 1, 64, 64), 12), ((30, 2, 9, 7), 21)])
def test_odd_sizes(shape, slots):
    rng = np.random.default_rng(0)
    T, B, H, W = shape
    masks = rng.random((T, B, slots, H, W), np.float32)
    masks /= masks.sum(2, keepdims=True)
    pictures = rng.random((T, B, slots, 1, H, W), np.float32)
    view = SlotView.of(SimpleNamespace(pictures=pictures, masks=masks, attention=rng.random((1, B, slots, 3, 2))))
    truth = rng.integers(0, 30, (T, B, H, W))
    for panel in panels(rng.random((T, B, 3, H, W)), view, view, T // 2, truth):
        if isinstance(panel.content, np.ndarray):
            assert panel.content.dtype == np.uint8 and panel.content.shape[1] <= 1100
        if isinstance(panel.content, Figure):
            panel.content.savefig(io.BytesIO())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pictures": np.zeros((2, 1, 3, 3, 4))}, "pictures: expected"),
        ({"masks": np.zeros((2, 1, 3, 4, 5))}, "masks: expected .* = "),
        ({"attention": np.zeros((3, 1, 3, 2, 2))}, "attention: expected"),
        ({"attention": np.zeros((2, 1, 3, 4))}, "attention: expected"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    fitting = {"pictures": np.zeros((2, 1, 3, 3, 4, 4)), "masks": np.zeros((2, 1, 3, 4, 4)), "attention": None}
    SlotView.of(SimpleNamespace(**fitting))
    with pytest.raises(ValueError, match=message):
        SlotView.of(SimpleNamespace(**{**fitting, **change}))


def test_sharpness_is_the_ratio_of_gradients(scenes):
    picture = scenes["image"][0] / 255.0
    np.testing.assert_allclose(sharpness(picture, picture), 1)
    np.testing.assert_allclose(sharpness(picture * 0.5 + 0.2, picture), 0.5)
    blurred = (picture + np.roll(picture, 1, -1) + np.roll(picture, 1, -2)) / 3
    assert (sharpness(torch.from_numpy(blurred), picture) < 0.85).all()
    ramp = np.broadcast_to(np.arange(5.0), (1, 4, 5))
    assert sharpness(ramp + 3 * np.arange(4.0)[:, None], ramp) == pytest.approx(np.sqrt(10))
    assert np.isnan(sharpness(picture[0], np.zeros_like(picture[0])))


def test_sharpness_sheet(scenes):
    picture = scenes["image"][0] / 255.0
    sheet = sharpness_sheet({"squared": picture * 0.5, "absolute": picture}, picture)
    shown = cells(sheet, [4 + i * (16 * 3 + 8) for i in range(3)], 3, 16, 3)
    np.testing.assert_array_equal(shown[0], scenes["image"][0].transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(shown[2], shown[0])
    assert (shown[1] <= shown[0]).all() and sheet.dtype == np.uint8


# With an agent


@pytest.fixture
def agent(tiny):
    tiny.env, tiny.image_size = "gym:phyxdream/Sprites-v0", 16
    return DreamerAgent(tiny)


def test_an_agent_with_slots_gets_panels_and_one_without_none(agent, tmp_path):
    assert slot_panels(agent) == []
    calls = []

    def explain_slots(batch, context=None, generator=None):
        T, B = batch["is_first"].shape
        assert batch["action"].shape == (T, B, 5) and generator is not None
        calls.append(context)
        seen = T if context is None else context
        masks = torch.softmax(torch.randn(T, B, 4, 16, 16, generator=generator), 2)
        return SimpleNamespace(pictures=batch["image"][:, :, None].float().expand(-1, -1, 4, -1, -1, -1) / 255,
                               masks=masks, attention=masks[:seen, ..., ::2, ::2])  # fmt: skip

    agent.model.world_model.explain_slots = explain_slots
    shown = slot_panels(agent)
    assert calls == [None, 5] and len(shown) == 5 and "FG-ARI" in shown[0].content
    text = write_report(Run.create(tmp_path, {"env": "x"}), extra_panels=shown).read_text()
    assert "could not be drawn" not in text and "first 5 pictures" in text


def test_an_environment_that_cannot_be_made_is_a_sentence(agent, tmp_path):
    agent.model.world_model.explain_slots = None
    agent.config.env = "gym:phyxdream/Nothing-v0"
    (panel,) = slot_panels(agent)
    assert "no environment" in panel.content


def test_panels_are_pictures(scenes):
    picture, found = oracle(scenes, scenes["mask"], 5, blur=0.3)
    for panel in panels(picture, SlotView.of(found)):
        if isinstance(panel.content, np.ndarray):
            Image.fromarray(panel.content)
