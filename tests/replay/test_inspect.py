"""What `inspect` says about replays whose contents are known."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import phyxdream.replay.inspect as module
from phyxdream.errors import CheckpointError, ConfigError
from phyxdream.replay import Replay
from phyxdream.replay.inspect import find_episodes, inspect, print_inspection, write_contact_sheet

FLAGS = {"is_first": ((), "bool"), "is_last": ((), "bool"), "is_terminal": ((), "bool")}
SPEC = {"action": ((), "int32"), "reward": ((), "float32"), **FLAGS}
PICTURES = {"image": ((3, 12, 8), "uint8"), **SPEC}


def fill(lengths, capacity=1000, num_envs=1, spec=SPEC, terminal=True, seed=0):
    """Each ring gets episodes of these lengths in actions; step t of episode k has reward k + t / 100."""
    rng = np.random.default_rng(seed)
    replay = Replay(spec, capacity, num_envs)
    for episode, length in enumerate(lengths):
        for t in range(length + 1):
            last = t == length
            add(replay, rng, is_first=t == 0, is_last=last, is_terminal=last and terminal, action=int(t > 0),
                reward=(episode + t / 100) * (t > 0))  # fmt: skip
    return replay


def add(replay, rng, **values):
    step = {}
    for key, (shape, dtype) in replay.spec.items():
        shape = (replay.num_envs, *shape)
        if key in values:
            step[key] = np.full(shape, values[key], dtype)
        elif dtype == "uint8":
            step[key] = rng.integers(0, 256, shape, np.uint8)
        else:
            step[key] = rng.normal(size=shape).astype("float32") if "float" in dtype else np.zeros(shape, dtype)
    replay.add(step)


def printed(inspection, width=100):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_inspection(inspection, console)
    return console.file.getvalue()


def test_counts_and_episodes():
    replay = fill([3, 5, 2], num_envs=2)
    found = inspect(replay)
    assert found.path is None and found.steps_per_env == (13, 13) and found.warnings == ()
    assert found.episodes["env"].tolist() == [0, 1, 0, 1, 0, 1]
    assert found.episodes["start"].tolist() == [0, 0, 4, 4, 10, 10]
    assert found.lengths.tolist() == [3, 3, 5, 5, 2, 2]
    expected = [sum(k + t / 100 for t in range(1, length + 1)) for k, length in enumerate([3, 5, 2])]
    np.testing.assert_allclose(found.returns, np.repeat(expected, 2), rtol=1e-6)
    for name in ("begun", "ended", "flagged", "terminal"):
        assert found.episodes[name].all()
    assert len(found.complete) == replay.num_episodes == 6


def test_episodes_cut_at_either_end():
    replay = fill([6, 4], capacity=10, terminal=False)
    add(replay, np.random.default_rng(0), is_first=True)
    add(replay, np.random.default_rng(0), is_first=False, reward=2.0)
    found = find_episodes(replay)
    assert found["start"].tolist() == [4, 7, 12] and found["steps"].tolist() == [3, 5, 2]
    assert found["begun"].tolist() == [False, True, True] and found["ended"].tolist() == [True, True, False]
    assert not found["terminal"].any()
    assert inspect(replay).lengths.tolist() == [4]
    text = printed(inspect(replay))
    assert "1 without their beginning, 1 still open" in text


@pytest.mark.parametrize("piece", [1, 4, 12, 28, 1 << 20])
def test_pieces_do_not_show(piece, monkeypatch):
    replay = fill([3, 1, 7, 2, 5], capacity=18)
    add(replay, np.random.default_rng(0), is_first=True)
    whole = find_episodes(replay)
    warnings = inspect(replay).warnings
    monkeypatch.setattr(module, "_PIECE_BYTES", piece)
    cut = find_episodes(replay)
    for name in whole.dtype.names:
        np.testing.assert_allclose(cut[name], whole[name], err_msg=name)
    assert inspect(replay).warnings == warnings


def test_episodes_match_a_plain_loop():
    rng = np.random.default_rng(1)
    spec = {"reward": ((), "float32"), "is_first": ((), "bool"), "is_last": ((), "bool")}
    for _ in range(30):
        replay = Replay(spec, 21, 3)
        rows = [[], [], []]
        for _ in range(rng.integers(1, 40)):
            env = int(rng.integers(3))
            step = {"reward": rng.normal(), "is_first": rng.random() < 0.3, "is_last": rng.random() < 0.3}
            rows[env].append(step)
            replay.add({key: np.array([value]) for key, value in step.items()}, [env])
        expected = []
        for env, steps in enumerate(rows):
            begin = max(0, len(steps) - 7)
            for number in range(begin, len(steps)):
                if number == begin or steps[number]["is_first"]:
                    expected.append([number, env, 0, 0.0, steps[number]["is_first"], True, False])
                expected[-1][2] += 1
                expected[-1][3] += steps[number]["reward"]
                expected[-1][6] = steps[number]["is_last"]
            if steps:
                expected[-1][5] = steps[-1]["is_last"]
        found = find_episodes(replay)
        for episode, (start, env, count, total, begun, ended, flagged) in zip(found, sorted(expected), strict=True):
            assert (episode["start"], episode["env"], episode["steps"]) == (start, env, count)
            assert (episode["begun"], episode["ended"], episode["flagged"]) == (begun, ended, flagged)
            assert episode["return"] == pytest.approx(total, abs=1e-5)
        assert (found["begun"] & found["ended"]).sum() == replay.num_episodes


# Warnings


def rows(replay, *steps):
    rng = np.random.default_rng(0)
    for step in steps:
        add(
            replay, rng, **{"is_first": False, "is_last": False, "is_terminal": False, "reward": 1, "action": 0, **step}
        )
    return inspect(replay).warnings


FIRST, LAST, GO = {"is_first": True, "reward": 0}, {"is_last": True}, {}


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([], ["nothing is stored"]),
        ([FIRST, {"reward": 0}, {"reward": 0, **LAST}], ["every reward is zero"]),
        ([GO, GO], ["no stored step is_first"]),
        ([FIRST, {**FIRST, **LAST}, FIRST], ["is_first is set at every step", "every reward is zero", "1 episode cut"]),
        ([FIRST, GO, FIRST, GO, FIRST, GO], ["2 episodes cut off"]),
        ([FIRST, LAST, GO, {"is_terminal": True}, GO], ["is_last is set at 1 step ", "is_terminal is set at 1 step "]),
        ([{**FIRST, "action": 3}, GO, LAST], ["action is not zero at 1 first step"]),
        ([{**FIRST, "reward": 3}, GO, LAST], ["reward is not zero at 1 first step"]),
        ([FIRST, GO, LAST], []),
        ([FIRST, GO, LAST, FIRST, GO], []),
    ],
)
def test_warnings(steps, words):
    warnings = rows(Replay(SPEC, 100, 1), *steps)
    assert len(warnings) == len(words)
    for warning, word in zip(warnings, words, strict=True):
        assert word in warning


def test_warnings_about_observations():
    spec = {"image": ((1, 8, 8), "uint8"), "state": ((2,), "float32"), **SPEC}
    steps = [FIRST, *[GO] * 40]
    assert rows(Replay(spec, 100, 1), *steps) == ()
    assert rows(Replay(spec, 100, 1), *steps[:30], {"state": np.nan}, {"state": np.inf}) == (
        "state is NaN or infinite at 2 steps",
    )
    still = rows(Replay(spec, 100, 1), *[{**step, "image": 7} for step in steps])
    assert len(still) == 1 and "image is the same picture in all of 32 steps" in still[0]


# In the terminal


def test_the_printed_page():
    replay = fill([3, 5, 2, 2], num_envs=2, spec={**PICTURES, "touch": ((4,), "float16")})
    text = printed(inspect(replay))
    for words in ("32 of 1,000 (3%), 32 ever added", "2, holding 16 steps", "3×12×8", "288 B", "float16", "Uniform()",
                  "8, 8 of them by termination", "2 to 5, median 2.5 actions", "█"):  # fmt: skip
        assert words in text
    assert "warning" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_printed_page_of_an_empty_replay():
    text = printed(inspect(Replay(SPEC, 10, 1)))
    assert "0 of 10" in text and "warning: nothing is stored yet" in text


def test_bars_count_every_episode():
    few = module._bars(np.array([1.0, 1.0, 0.0, np.nan]), "#")
    assert few == [("0", "#" * 20, "1"), ("1", "#" * 40, "2")]
    many = module._bars(np.append(np.arange(1000.0), 1e6), "#")
    assert len(many) == 10 and [row[2] for row in many] == ["1,000", *["0"] * 8, "1"]
    assert many[0][1] == "#" * 40 and many[-1][1] == "#" and many[1][1] == ""


# Files


def test_a_snapshot_a_checkpoint_and_a_run(tmp_path):
    from phyxdream.train import checkpoint
    from phyxdream.train.run import Run

    run = Run.create(tmp_path / "run", {})
    with pytest.raises(CheckpointError, match="no checkpoint"):
        inspect(tmp_path / "run")
    path = checkpoint.save(run, 10, {}, {})
    for place in (tmp_path / "run", path):
        with pytest.raises(CheckpointError, match="holds no replay"):
            inspect(place)
    replay = fill([3, 5])
    replay.save(str(tmp_path / "snapshot"))
    path = checkpoint.save(run, 20, {}, {}, replay)
    for place, found_in in ((tmp_path / "snapshot", tmp_path / "snapshot"), (path, path / "replay"),
                            (tmp_path / "run", path / "replay")):  # fmt: skip
        found = inspect(place)
        assert found.path == found_in and found.lengths.tolist() == [3, 5]
        assert str(found_in.name) in printed(found, width=300)


def test_a_checkpoint_that_is_replaced_meanwhile_is_not_an_error(tmp_path, monkeypatch):
    from phyxdream.train import checkpoint
    from phyxdream.train.run import Run

    run = Run.create(tmp_path / "run", {})
    replay = fill([3])
    checkpoint.save(run, 10, {}, {}, replay)
    load = Replay.load

    def slow(path):
        monkeypatch.setattr(Replay, "load", load)
        checkpoint.save(run, 20, {}, {}, replay)
        return load(path)

    monkeypatch.setattr(Replay, "load", slow)
    assert "000020" in str(inspect(tmp_path / "run").path)


def test_wrong_places_are_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "index.json").write_text(json.dumps({}))
    for name in ("nowhere", "file", "empty", "foreign"):
        with pytest.raises(CheckpointError, match=name):
            inspect(tmp_path / name)


# The contact sheet


def test_the_sheet_shows_the_frames(tmp_path):
    replay = fill([3, 20], spec=PICTURES)
    write_contact_sheet(inspect(replay), tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    frames = replay.read(0, 0, 25, ["image"])["image"].numpy()
    shown = [0, 1, 2, 3, *(4 + np.linspace(0, 20, 10).round().astype(int))]
    for step in shown:
        assert contains(sheet, np.moveaxis(frames[step], 0, -1).repeat(8, 0).repeat(8, 1)), step
    assert not contains(sheet, np.moveaxis(frames[5], 0, -1).repeat(8, 0).repeat(8, 1))


def contains(sheet, picture):
    """Whether the picture lies in the sheet pixel by pixel."""
    height, width = picture.shape[:2]
    corner = (sheet == picture[0, 0]).all(-1)
    return any(
        np.array_equal(sheet[y : y + height, x : x + width], picture)
        for y, x in np.argwhere(corner)
        if y + height <= len(sheet) and x + width <= sheet.shape[1]
    )


@pytest.mark.parametrize(
    "shape", [(1, 10, 5), (4, 84, 84), (9, 16, 16), (20, 30), (16, 24, 3), (3, 210, 160), (3, 400, 20), (3, 5, 600)]
)
def test_every_kind_of_picture_makes_a_sheet(shape, tmp_path):
    replay = fill([2, 12], spec={"view": (shape, "uint8"), **SPEC})
    write_contact_sheet(inspect(replay), tmp_path / "sheet.png")
    assert min(Image.open(tmp_path / "sheet.png").size) > 100


def test_stacked_frames_show_the_last():
    picture = np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5)
    np.testing.assert_array_equal(module._frame(picture), np.repeat(picture[3][..., None], 3, -1))
    colour = np.arange(6 * 6 * 5, dtype=np.uint8).reshape(6, 6, 5)
    np.testing.assert_array_equal(module._frame(colour), np.moveaxis(colour[3:], 0, -1))


@pytest.mark.parametrize("lengths", [[3, 5], [], [0]])
def test_without_pictures_or_whole_episodes_there_is_still_something_to_see(lengths, tmp_path):
    for spec in (SPEC, {"is_first": ((), "bool")}, PICTURES, {"state": ((40,), "bfloat16"), **SPEC}):
        replay = fill(lengths, spec=spec)
        add(replay, np.random.default_rng(0), is_first=True)
        write_contact_sheet(inspect(replay), tmp_path / "plot.png")
        image = Image.open(tmp_path / "plot.png")
        image.load()
        assert len(np.unique(np.asarray(image.convert("L")))) > 5


def test_sheets_that_cannot_be_written(tmp_path):
    found = inspect(fill([2]))
    with pytest.raises(ConfigError, match=r"sheet\.jpg.*\.png"):
        write_contact_sheet(found, tmp_path / "sheet.jpg")
    with pytest.raises(ConfigError, match="nowhere"):
        write_contact_sheet(found, tmp_path / "nowhere" / "sheet.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ConfigError, match="folder"):
        write_contact_sheet(found, tmp_path / "folder.png")
    with pytest.raises(ConfigError, match="nothing is stored"):
        write_contact_sheet(inspect(Replay(SPEC, 10, 1)), tmp_path / "sheet.png")
