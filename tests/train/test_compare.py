import io
import itertools
import json
import os
import re
import time

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from phyxdream.agents import preset
from phyxdream.cli import main
from phyxdream.errors import ConfigError, PhyxdreamError
from phyxdream.train import report
from phyxdream.train.compare import (
    POINTS,
    Curve,
    bootstrap_interval,
    common_band,
    compare,
    curves_figure,
    differing,
    group,
    interquartile_mean,
    read_member,
)
from phyxdream.train.metrics import Metrics
from phyxdream.train.run import Run

ENV = "gym:CartPole-v1"


def make_run(path, returns=(1.0, 2.0, 3.0), *, evaluations=(), every=10, seconds=60.0, name="dreamer_v3", **options):
    """A run that logged one of `returns` every `every` steps and `seconds` seconds; evaluations are (step, returns)."""
    options = {"env": ENV, "size": "1m", "total_steps": every * len(returns), **options}
    run = Run.create(path, preset(name, logdir=str(path), **options).resolve().to_dict())
    with Metrics(run) as metrics:
        metrics._tensorboard_works = False
        for i, value in enumerate(returns, 1):
            metrics._origin = time.monotonic() - seconds * i
            metrics.log(every * i, {} if value is None else {"episode/return": value})
    for step, episodes in evaluations:
        row = {"step": step, "returns": list(episodes), "time": seconds * step / every, "seed": 1_000_000}
        run.add_evaluation(row)
    return run.path


def groups_of(*paths, by=()):
    return group([read_member(path) for path in paths], by)


def on_host(path, host):
    versions = json.loads((path / "versions.json").read_text())
    versions["starts"][-1]["host"] = host
    (path / "versions.json").write_text(json.dumps(versions))


# Statistics


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([[7]], 7),
        ([[1], [2]], 1.5),
        ([[0], [3], [9]], 4),  # ⌊3/4⌋ = 0 are left out
        ([[100], [2], [0], [3]], 2.5),
        ([[100], [2], [0], [3], [1]], 2),
        ([[1, 5], [2, 6], [3, 7], [4, 8]], 4.5),  # over runs and tasks together: 3 4 5 6
        ([[1, 10], [3, 20]], 6.5),
    ],
)
def test_interquartile_mean_is_the_mean_of_the_middle_half(scores, expected):
    assert interquartile_mean(np.array(scores, float)) == expected


def test_interquartile_mean_of_every_trailing_element():
    scores = np.array([[[0.0, 8.0]], [[1.0, 6.0]], [[2.0, 4.0]], [[50.0, 2.0]]])
    np.testing.assert_array_equal(interquartile_mean(scores), [1.5, 5.0])


@pytest.mark.parametrize(
    ("confidence", "expected"),
    # Means of three draws from 0, 3, 6 are 0 to 6 with 1, 3, 6, 7, 6, 3, 1 of 27 chances: cumulated 0.037, 0.148,
    # 0.370, 0.630, 0.852, 0.963, 1.
    [(0.95, (0, 6)), (0.8, (1, 5)), (0.5, (2, 4)), (0.2, (3, 3))],
)
def test_interval_of_three_runs_by_hand(confidence, expected):
    scores = np.array([[0.0], [3.0], [6.0]])
    np.testing.assert_allclose(bootstrap_interval(scores, confidence=confidence), expected, atol=1e-12)


@pytest.mark.parametrize("runs", [2, 4, 5])
def test_interval_against_all_resamples_there_are(runs):
    values = np.random.default_rng(runs).normal(size=runs)
    cut = runs // 4
    all_of_them = [np.mean(sorted(draw)[cut : runs - cut]) for draw in itertools.product(values, repeat=runs)]
    found = bootstrap_interval(values[:, None], repetitions=40_000)
    np.testing.assert_allclose(found, np.percentile(all_of_them * 100, [2.5, 97.5]), atol=0.02)


def test_the_bootstrap_is_stratified():
    # Drawn from all scores alike, resamples would differ; within tasks, they cannot.
    level = np.array([[0.0, 100.0]] * 3)
    np.testing.assert_array_equal(bootstrap_interval(level), [50, 50])
    # Whole runs drawn for both tasks would have an IQM of 0 always; runs drawn for each task have ±0.5 with 3 of 16.
    opposed = np.array([[0.0, 0.0], [1.0, -1.0]])
    np.testing.assert_array_equal(bootstrap_interval(opposed), [-0.5, 0.5])
    np.testing.assert_array_equal(bootstrap_interval(opposed, confidence=0.5), [0, 0])


def test_the_bootstrap_is_the_same_every_time_and_for_every_point():
    scores = np.random.default_rng(0).normal(size=(5, 2, 70))
    found = bootstrap_interval(scores)
    assert found.shape == (2, 70)
    np.testing.assert_array_equal(bootstrap_interval(scores), found)
    np.testing.assert_array_equal(bootstrap_interval(scores[..., 66]), found[:, 66])
    assert (bootstrap_interval(scores, seed=1) != found).any()


def test_curves_meet_between_their_points_and_nowhere_else():
    band = common_band([Curve(np.array([0.0, 10.0]), np.array([0.0, 10.0])),
                        Curve(np.array([5.0, 8.0, 20.0]), np.array([0.0, 6.0, 30.0]))])  # fmt: skip
    np.testing.assert_array_equal(band.x, [5, 8, 10])
    np.testing.assert_array_equal(band.iqm, [2.5, 7, 10])  # of 5 and 0, 8 and 6, 10 and 10
    np.testing.assert_array_equal(band.interval, [[0, 6, 10], [5, 8, 10]])
    assert common_band([Curve(np.arange(2.0), np.arange(2.0)), Curve(np.arange(5.0, 7.0), np.arange(2.0))]) is None


def test_long_curves_are_thinned_and_keep_their_ends():
    x = np.arange(5000.0)
    band = common_band([Curve(x, x)])
    assert len(band.x) == POINTS and band.x[[0, -1]].tolist() == [0, 4999] and band.interval is None


# Reading


def test_a_run_as_it_is_read(tmp_path):
    evaluations = [(20, [1.0, 3.0]), (40, [5.0, 9.0])]
    path = make_run(tmp_path / "run", [1, None, float("nan"), 4], evaluations=evaluations, seed=3)
    Run.open(path).add_evaluation({"step": 40, "returns": [4.0, 4.0, 4.0], "seed": 2_000_000})
    member = read_member(path)
    assert (member.path, member.env, member.step, member.finished) == (path, ENV, 40, True)
    assert member.seconds == pytest.approx(240, abs=0.1)
    np.testing.assert_array_equal(member.training["step"], [[10, 40], [1, 4]])
    np.testing.assert_allclose(member.training["time"].x, [60, 240], atol=0.1)
    everything = [5.0, 9.0, 4.0, 4.0, 4.0]
    assert member.final == {"step": 40, "time": 240, "mean": pytest.approx(np.mean(everything)),
                            "std": pytest.approx(np.std(everything)), "episodes": 5}  # fmt: skip
    np.testing.assert_allclose(member.evaluation["step"], [[20, 40], [2, 5.2]])


def test_evaluating_again_with_the_same_seed_counts_once(tmp_path):
    path = make_run(tmp_path / "run")
    for returns in ([1.0, 2.0], [1.0, 2.0, 3.0]):
        Run.open(path).add_evaluation({"step": 30, "returns": returns, "seed": 5})
    final = read_member(path).final
    assert (final["mean"], final["episodes"]) == (2, 3)
    assert final["time"] == pytest.approx(180, abs=0.1)  # `phyxdream eval` does not store it: that of the step


# Grouping


def test_what_an_exploring_policy_earned_does_not_count(tmp_path):
    run = Run.open(make_run(tmp_path / "run", evaluations=[(30, [1.0, 3.0])]))
    run.add_evaluation({"step": 30, "returns": [100.0], "seed": 2, "explore": True})
    assert read_member(run.path).final["mean"] == 2.0


def test_runs_that_differ_in_seed_and_bookkeeping_are_one_method(tmp_path):
    paths = [make_run(tmp_path / str(seed), seed=seed, log_every=100 + seed, eval_every=seed) for seed in (2, 0, 10)]
    (only,) = groups_of(*paths)
    assert [member.options["seed"] for member in only.members] == [0, 2, 10]
    assert (only.label, only.size) == ("dreamer_v3", "3 seeds")


def test_labels_say_what_sets_methods_apart(tmp_path):
    paths = [
        make_run(tmp_path / "a", train_ratio=64.0),
        make_run(tmp_path / "b", train_ratio=16.5, cell="gru"),
        make_run(tmp_path / "c", name="catch"),
    ]
    labels = [g.label for g in groups_of(*paths)]
    assert labels == ["dreamer_v3, train_ratio=64, cell=block_gru", "dreamer_v3, train_ratio=16.5, cell=gru", "catch"]


def test_sizes_that_follow_from_size_are_left_out(tmp_path):
    groups = groups_of(make_run(tmp_path / "a"), make_run(tmp_path / "b", size="12m"))
    assert [g.label for g in groups] == ["dreamer_v3, size=1m", "dreamer_v3, size=12m"]
    assert differing(groups) == ["size"]
    groups = groups_of(make_run(tmp_path / "c"), make_run(tmp_path / "d", size="12m", units=64))
    assert [g.label for g in groups] == ["dreamer_v3, size=1m", "dreamer_v3, size=12m"]


def test_long_labels_are_cut_as_long_as_they_tell_methods_apart(tmp_path):
    many = {"batch_size": 8, "batch_length": 16, "train_ratio": 8.0, "units": 32, "free_nats": 0.5, "discount": 0.9}
    paths = [make_run(tmp_path / "a"), make_run(tmp_path / "b", **many), make_run(tmp_path / "c", **many, agc=0.1)]
    labels = [g.label for g in groups_of(*paths)]
    assert len(set(labels)) == 3 and labels[2].endswith("agc=0.1")
    assert groups_of(*paths[:2])[1].label.endswith(", …")


def test_an_environment_has_groups_of_its_own_with_the_same_labels(tmp_path):
    paths = [
        make_run(tmp_path / f"{i}-{cell}", env=env, cell=cell, action_repeat=i)
        for i, env in ((1, ENV), (2, "gym:Acrobot-v1"))
        for cell in ("gru", "block_gru")
    ]
    groups = groups_of(*paths)
    assert [(g.env, g.label) for g in groups] == [
        (env, f"dreamer_v3, cell={cell}") for env in (ENV, "gym:Acrobot-v1") for cell in ("gru", "block_gru")
    ]


def test_by_names_the_options_that_count(tmp_path):
    paths = [make_run(tmp_path / f"{i}", train_ratio=2.0**i, cell=("gru", "block_gru")[i % 2]) for i in range(4)]
    groups = groups_of(*paths, by=["cell", "preset"])
    assert [(g.label, len(g.members)) for g in groups] == [
        ("cell=gru, dreamer_v3", 2),
        ("cell=block_gru, dreamer_v3", 2),
    ]
    assert [g.label for g in groups_of(*paths, by=["env"])] == [ENV]
    with pytest.raises(ConfigError, match="'train_ration'; did you mean 'train_ratio'"):
        groups_of(*paths, by=["train_ration"])


def test_options_that_an_older_run_lacks_are_at_their_defaults(tmp_path):
    old, new = make_run(tmp_path / "old"), make_run(tmp_path / "new", seed=1)
    config = json.loads((old / "config.json").read_text())
    del config["l1_coeff"], config["slot_coeff"]
    (old / "config.json").write_text(json.dumps(config))
    assert len(groups_of(old, new)) == 1


# What is written


def test_a_comparison(tmp_path):
    paths = [
        make_run(tmp_path / "a0", [0, 2, 4], evaluations=[(30, [1.0, 3.0])]),
        make_run(tmp_path / "a1", [2, 4, 6], evaluations=[(30, [5.0, 7.0])], seed=1, seconds=90),
        make_run(tmp_path / "b0", [1, 1, 1], cell="gru"),
    ]
    found = compare(paths, tmp_path / "new" / "out")
    assert sorted(p.name for p in (tmp_path / "new" / "out").iterdir()) == [
        "compare.html", "compare.json", "compare.png",
    ]  # fmt: skip
    assert sorted(found.files) == sorted((tmp_path / "new" / "out").iterdir())
    Image.open(tmp_path / "new" / "out" / "compare.png").verify()

    numbers = json.loads((tmp_path / "new" / "out" / "compare.json").read_text())
    assert numbers["statistics"]["repetitions"] == 2000
    first, second = numbers["groups"]
    assert first["label"] == "dreamer_v3, cell=block_gru" and first["method"]["cell"] == "block_gru"
    curve = first["curves"]["training return by step"]
    assert curve == {"x": [10, 20, 30], "iqm": [1, 3, 5], "low": [0, 2, 4], "high": [2, 4, 6]}
    assert "evaluation return by step" not in first["curves"]  # one evaluation is no curve
    assert first["evaluation"] == {
        "mean": 4, "std": pytest.approx(np.std([1, 3, 5, 7])), "episodes": 4, "runs": 2, "iqm": 4, "interval": [2, 6],
    }  # fmt: skip
    minutes = np.array(first["curves"]["training return by time"]["x"]) / 60
    np.testing.assert_allclose(minutes, [1.5, 2, 3], atol=0.01)
    assert set(second["curves"]["training return by step"]) == {"x", "iqm"} and second["evaluation"] is None
    assert [run["seed"] for run in first["runs"]] == [0, 1]

    row, other = found.rows()
    assert row == {
        "method": "dreamer_v3, cell=block_gru", "environment": ENV, "seeds": "2", "env steps": "30",
        "minutes": "3.0–4.5", "evaluation": "4.000 ± 2.236", "episodes": "4", "IQM [95 %]": "4.000 [2.000, 6.000]",
    }  # fmt: skip
    assert other["evaluation"] == other["IQM [95 %]"] == "–"
    assert found.notes() == [f"{paths[2]}: not evaluated yet."]

    console = Console(file=io.StringIO(), width=80)
    console.print(*found.tables())
    shown = console.file.getvalue()
    for word in (ENV, "cell=block_gru", "[2.000, 6.000]", "4.000 ± 2.236", "3.0–4.5"):
        assert word in shown


def test_the_page_holds_figures_tables_and_notes_and_asks_for_nothing_else(tmp_path):
    paths = [
        make_run(tmp_path / "a", evaluations=[(10, [1.0]), (30, [2.0])]),
        make_run(tmp_path / "b", evaluations=[(10, [1.0]), (30, [2.5])], seed=1),
        make_run(tmp_path / "<c>", env="gym:Acrobot-v1", cell="gru"),
    ]
    compare(paths, tmp_path / "out")
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("<svg") == 2 and page.count("<figure>") == 2
    for word in ("evaluation return", "training return", "wall-clock", "environment steps", "2 seeds", "1 seed",
                 "2.250", "not evaluated yet", "bootstrap", ENV, "gym:Acrobot-v1", str(paths[0])):  # fmt: skip
        assert word in page, word
    assert "&lt;c&gt;" in page and "<c>" not in page and "<script" not in page
    assert all(target.startswith(("#", "data:")) for target in re.findall(r'(?:src|href)="([^"]*)"', page))
    for tag in ("table", "tr", "td", "section", "figure", "svg", "p"):
        assert len(re.findall(f"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag


def test_the_same_runs_give_the_same_files(tmp_path):
    paths = [make_run(tmp_path / str(seed), [seed, 2.0], seed=seed) for seed in range(3)]
    first, second = (compare(paths, tmp_path / name) for name in ("one", "two"))
    for one, two in zip(first.files, second.files, strict=True):
        assert one.read_bytes() == two.read_bytes()


def test_a_picture_for_every_environment(tmp_path):
    paths = [make_run(tmp_path / "a"), make_run(tmp_path / "b", env="gym:phyxdream/Sprites-v0")]
    compare(paths, tmp_path / "out")
    names = {"compare.png", "compare-gym-CartPole-v1.png", "compare-gym-phyxdream-Sprites-v0.png"}
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == names
    height = {name: Image.open(tmp_path / "out" / name).height for name in names}
    assert height["compare.png"] == pytest.approx(sum(height.values()) / 2, abs=2)


def test_a_method_keeps_its_colour_from_figure_to_figure(tmp_path):
    paths = [
        make_run(tmp_path / "a", cell="gru"),
        make_run(tmp_path / "b"),
        make_run(tmp_path / "c", env="gym:Acrobot-v1"),
    ]
    groups = groups_of(*paths)
    (part,) = curves_figure(groups[2:], groups).subfigs
    two, _ = curves_figure(groups).subfigs
    colours = {g.label: line.get_color() for g, line in zip(groups[:2], two.axes[0].lines[:2], strict=True)}
    assert part.axes[0].lines[0].get_color() == colours[groups[2].label] == colours[groups[1].label]
    assert colours[groups[0].label] != colours[groups[1].label]


def test_a_single_seed_has_no_band(tmp_path):
    paths = [make_run(tmp_path / str(seed), [seed, 1.0], seed=seed) for seed in range(2)]
    for some, bands, words in ((paths[:1], 0, "(1 seed)"), (paths, 1, "(2 seeds)")):
        (part,) = curves_figure(groups_of(*some)).subfigs
        assert [len(axes.collections) for axes in part.axes] == [bands] * 2
        assert [text.get_text().endswith(words) for text in part.legends[0].get_texts()] == [True]


def test_evaluations_on_the_way_have_a_row_of_their_own(tmp_path):
    path = make_run(tmp_path / "a", evaluations=[(10, [1.0, 2.0]), (30, [2.0])])
    (part,) = curves_figure(groups_of(path)).subfigs
    assert [axes.get_ylabel() for axes in part.axes] == ["training return", "", "evaluation return", ""]
    np.testing.assert_allclose(part.axes[2].lines[0].get_xydata(), [[10, 1.5], [30, 2]])
    np.testing.assert_allclose(part.axes[3].lines[0].get_xydata(), [[1, 1.5], [3, 2]])
    once = [
        make_run(tmp_path / f"{seed}", seed=seed, cell="gru", evaluations=[(30, [seed, 6.0])], seconds=60 + 120 * seed)
        for seed in range(2)
    ]
    (part,) = curves_figure(groups_of(path, *once)).subfigs
    for axes, x in zip(part.axes[2:], (30, 6), strict=True):
        np.testing.assert_allclose(axes.lines[1].get_xydata(), [[x, 3.25]])
        np.testing.assert_allclose(axes.collections[0].get_segments(), [[[x, 3.0], [x, 3.5]]])


def test_more_methods_than_colours(tmp_path):
    groups = groups_of(*(make_run(tmp_path / str(i), batch_size=8 + i) for i in range(8)))
    (part,) = curves_figure(groups).subfigs
    styles = {(line.get_color(), str(line.get_linestyle())) for line in part.axes[0].lines}
    assert len({colour for colour, _ in styles}) == 6 and len(styles) == 8


def test_a_run_in_progress_ends_the_curve_and_is_told(tmp_path):
    done = make_run(tmp_path / "done", [1, 2, 3, 4], evaluations=[(40, [4.0])])
    going = make_run(tmp_path / "going", [3, 4], seed=1, total_steps=40, evaluations=[(20, [4.0])])
    with open(going / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "episode/ret')  # as another process is writing it
    found = compare([done, going], tmp_path / "out")
    (only,) = found.groups
    np.testing.assert_array_equal(only.bands["training", "step"].x, [10, 20])
    np.testing.assert_array_equal(only.bands["training", "step"].iqm, [2, 3])
    assert found.rows()[0]["env steps"] == "20–40 (1 unfinished)"
    assert [note.split(": ", 1)[1] for note in found.notes()] == [
        "unfinished, at 20 of 40 steps.",
        "curves end at 20 steps with the shortest run; the longest has 40.",
        "evaluated at different steps, 20 to 40.",
    ]


def test_what_makes_intervals_doubtful_is_told(tmp_path):
    twice = [make_run(tmp_path / name, evaluations=[(30, [1.0])]) for name in ("a", "b")]
    found = compare([*twice, twice[0]], tmp_path / "out")
    assert len(found.groups[0].members) == 2 and found.groups[0].size == "2 runs"
    assert "a seed came twice" in found.notes()[0]
    other = make_run(tmp_path / "c", evaluations=[(30, [1.0])], seed=1, cell="gru")
    assert "its runs differ in cell" in compare([twice[0], other], tmp_path / "out", ["preset"]).notes()[0]


def test_machines_are_shown_where_they_differ(tmp_path):
    paths = [make_run(tmp_path / str(seed), seed=seed) for seed in range(2)]
    on_host(paths[0], "one")
    on_host(paths[1], "one")
    assert "machine" not in compare(paths, tmp_path / "out").rows()[0]
    on_host(paths[1], "two")
    shown = compare(paths, tmp_path / "out").rows()[0]["machine"]
    assert shown.startswith("one: ") and "; two: " in shown


def test_a_damaged_line_is_left_out_and_told(tmp_path):
    path = make_run(tmp_path / "run")
    lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (path / "metrics.jsonl").write_bytes(lines[0] + b"\0\0\n" + lines[2])
    member = read_member(path)
    assert member.training["step"].x.tolist() == [10, 30]
    assert str(path / "metrics.jsonl") in member.notes[0] and "1 damaged" in member.notes[0]


# What cannot be compared


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("versions.json", None, ["is not a phyxdream run"]),
        ("versions.json", b"{", ["versions.json is damaged"]),
        ("versions.json", b'{"format": "phyxdream-run", "version": 1, "starts": [3]}', ["versions.json is damaged"]),
        ("config.json", b"[]", ["config.json is damaged"]),
        ("metrics.jsonl", None, ["has no metrics yet"]),
        ("metrics.jsonl", b"", ["has no metrics yet"]),
        ("metrics.jsonl", b'{"step": 1', ["has no metrics yet"]),
        ("metrics.jsonl", b'{"step": 1, "time": 0.1}\n', ["has no episode return yet"]),
        ("metrics.jsonl", b"\0\0\n\0\n", ["metrics.jsonl is damaged"]),
        ("eval.json", b"{", ["eval.json is damaged"]),
        ("eval.json", b'[{"step": 1, "returns": ["high"]}]', ["eval.json is damaged"]),
    ],
)
def test_a_run_that_cannot_be_read_is_named_and_nothing_is_written(tmp_path, capsys, file, content, words):
    good, bad = make_run(tmp_path / "good"), make_run(tmp_path / "bad", seed=1)
    if content is None:
        os.unlink(bad / file)
    else:
        (bad / file).write_bytes(content)
    assert main(["compare", str(good), str(bad), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    for word in (*words, str(bad)):
        assert word in said
    assert len(said.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_where_it_cannot_be_written(tmp_path, monkeypatch):
    path = make_run(tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file is a file"):
        compare([path], tmp_path / "file")
    with pytest.raises(PhyxdreamError, match="could not write the comparison"):
        compare([path], tmp_path / "file" / "below")
    with pytest.raises(ConfigError, match="at least one run"):
        compare([], tmp_path / "out")
    before = {p.name: p.read_bytes() for p in compare([path], tmp_path / "out").files}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.Path, "write_bytes", full)
    with pytest.raises(PhyxdreamError, match="No space left on device"):
        compare([path], tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a", evaluations=[(30, [1.0])])
    make_run(tmp_path / "b", evaluations=[(30, [2.0])], seed=1, total_steps=60)
    assert main(["compare", "a", "b", "--by", "preset", "cell"]) == 0
    said = capsys.readouterr().out
    for words in (ENV, "1.500", "[1.000, 2.000]", "unfinished, at 30 of 60 steps", "page: compare/compare.html",
                  "picture: compare/compare.png", "numbers: compare/compare.json"):  # fmt: skip
        assert words in said
    assert sorted(p.name for p in (tmp_path / "compare").iterdir()) == ["compare.html", "compare.json", "compare.png"]
    assert main(["compare", "a", "--by", "cel", "--out", "other"]) == 1
    assert "did you mean 'cell'" in capsys.readouterr().err and not (tmp_path / "other").exists()
