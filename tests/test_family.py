"""`phyxdream.bench.family`: what counts of a run, commands that make it again, pages that agree with the files."""

import json
import shutil
from pathlib import Path

import pytest
import tyro

from phyxdream.agents import PRESETS, DreamerConfig, preset
from phyxdream.bench import family
from phyxdream.bench.results import ResultsError
from phyxdream.cli import Train
from phyxdream.train.run import Run

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / family.FOLDER
STORED = sorted(path for path in FOLDER.iterdir() if path.is_dir())
ONE_OF_EACH = list({path.name.rsplit("-seed", 1)[0]: path for path in STORED}.values())


def parse(words):
    """As `phyxdream train` does."""
    return tyro.cli(Train, args=words[1:], default=Train(preset(words[0]))).config


def same(a, b):
    return family._comparable(a) == family._comparable(b)


@pytest.mark.parametrize("name", PRESETS)
def test_commands_of_presets(name):
    assert family.arguments(preset(name)) == [name]
    assert family.arguments(preset(name).resolve()) == [name]


def test_commands_hold_what_differs():
    config = preset("dreamer_v3", size="1m", units=32, pixels=True, depth_mults=(1, 2), seed=3, learning_rate=5e-4,
                    replay_online=False, logdir="here")  # fmt: skip
    words = family.arguments(config.resolve())
    assert words == ["dreamer_v3", "--pixels", "True", "--no-replay-online", "--size", "1m", "--depth-mults", "1", "2",
                     "--units", "32", "--learning-rate", "0.0005"]  # fmt: skip
    assert same(parse(words), config)
    # Neither may be left out for the other.
    config = preset("planet", plan_candidates=64, plan_elites=8, env_options=("a=1", "b=x"))
    words = family.arguments(config)
    assert words == ["planet", "--env-options", "a=1", "b=x", "--plan-candidates", "64", "--plan-elites", "8"]
    assert same(parse(words), config)


@pytest.mark.parametrize("path", ONE_OF_EACH, ids=lambda path: path.name)
def test_commands_make_the_stored_runs_again(path):
    config = DreamerConfig.from_dict(Run.open(path).config)
    assert same(parse(family.arguments(config)), config)
    assert "cwd" not in (path / "versions.json").read_text()


def test_pages_are_what_the_runs_give(capsys):
    pages = [str(ROOT / "README.md"), str(ROOT / "docs" / "results" / "README.md")]
    assert family.main(["--folder", str(FOLDER), "--check", "--pages", *pages]) == 0, capsys.readouterr().out


def test_add_reads_back(tmp_path):
    pytest.importorskip("envpool")  # it measures a new task without learning
    source, folder = tmp_path / "run", tmp_path / "family"
    shutil.copytree(STORED[0], source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "env": "envpool:Catch-v0", "action_repeat": 1}))
    (written,) = family.add(folder, "some", [source])
    assert written.name == f"some-seed{config['seed']}"
    (method,) = family.read(folder)
    assert method.unlearned["episodes"] == 100
    assert all(-1 <= method.unlearned[policy]["mean"] < 0 for policy in ("random", "still"))
    text = family.update("<!-- family results -->\nold\n<!-- end family -->", [method])
    assert "| `some` |" in text and "old" not in text and "phyxdream train" in text
    (picture,) = family.write_pictures(folder, [method])
    assert picture.stat().st_size > 10_000
    with pytest.raises(ResultsError, match="'tabel'; did you mean 'table'"):
        family.update("<!-- family tabel -->\n<!-- end family -->", [method])


def test_unfinished_runs_are_refused(tmp_path):
    source = tmp_path / "run"
    shutil.copytree(STORED[0], source)
    (source / "eval.json").unlink()
    with pytest.raises(ResultsError, match="finished and evaluated"):
        family.add(tmp_path / "family", "some", [source])
    assert not (tmp_path / "family").exists()


def test_runs_of_one_name_differ_in_their_seed_alone(tmp_path):
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    one = tmp_path / STORED[0].name
    other = tmp_path / f"{STORED[0].name.rsplit('-seed', 1)[0]}-seed77"
    shutil.copytree(one, other)
    with pytest.raises(ResultsError, match="has seed"):
        family.read(tmp_path)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "seed": 77, "units": config["units"] + 1}))
    with pytest.raises(ResultsError, match="differ in more than their seed"):
        family.read(tmp_path)
