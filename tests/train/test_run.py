import json
import os
import subprocess
import sys

import pytest

from phyxdream.errors import ConfigError
from phyxdream.train.run import Run, environment

CONFIG = {"env": "envpool:Catch-v0", "seed": 3, "model": {"deter_size": 64}}


def test_a_run_explains_itself(tmp_path):
    run = Run.create(tmp_path / "a" / "run", CONFIG)
    assert Run.open(run.path).config == CONFIG
    (start,) = Run.open(run.path).versions()
    assert start["torch"] and start["numpy"] and start["python"].startswith("3.") and start["cores"] >= 1
    assert "phyxdream train --resume" in (run.path / "README.txt").read_text()
    assert run.checkpoints.is_dir()
    assert not list(run.path.glob("*.tmp")) and not list(run.path.glob(".*.tmp"))


def test_create_over_a_run_tells_the_ways_out_and_changes_nothing(tmp_path):
    Run.create(tmp_path, CONFIG)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    with pytest.raises(ConfigError, match=r"--resume.*--logdir"):
        Run.create(tmp_path, {"env": "other"})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_resume_appends_a_start_and_notes_what_changed(tmp_path):
    Run.create(tmp_path, CONFIG)
    run = Run.create(tmp_path, {**CONFIG, "seed": 4}, resume=True)
    first, second = run.versions()
    assert "config_changes" not in first
    assert second["config_changes"] == {"seed": [3, 4]}
    assert Run.open(tmp_path).config["seed"] == 4


def test_resume_without_a_run(tmp_path):
    with pytest.raises(ConfigError, match="no such directory"):
        Run.create(tmp_path / "nothing", CONFIG, resume=True)
    assert not (tmp_path / "nothing").exists()


def test_foreign_directories_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        Run.create(tmp_path, CONFIG)
    with pytest.raises(ConfigError, match="not a phyxdream run"):
        Run.open(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="is a file"):
        Run.create(tmp_path / "thesis.tex", CONFIG)


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ("{", "damaged"),
        ("[]", "not a phyxdream run"),
        ('{"format": "other"}', "not a phyxdream run"),
        ('{"format": "phyxdream-run", "version": 99}', "newer phyxdream"),
    ],
)
def test_damaged_and_newer_runs(tmp_path, versions, message):
    (tmp_path / "versions.json").write_text(versions)
    with pytest.raises(ConfigError, match=message):
        Run.open(tmp_path)


def test_a_start_that_was_killed_can_be_repeated(tmp_path):
    run = Run.create(tmp_path, CONFIG)
    os.unlink(run.path / "versions.json")
    assert Run.create(tmp_path, CONFIG).config == CONFIG


def test_leftover_checkpoints_are_never_taken_for_an_empty_directory(tmp_path):
    (tmp_path / "checkpoints" / "step-000000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match="step-000000001"):
        Run.create(tmp_path, CONFIG)


def test_a_config_that_is_not_json_touches_nothing(tmp_path):
    with pytest.raises(ConfigError, match="object"):
        Run.create(tmp_path / "run", {"env": object()})
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no fcntl")
def test_a_second_process_is_kept_out_until_the_first_is_gone(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    code = (
        "import sys; from phyxdream.train.run import Run; from phyxdream.errors import ConfigError\n"
        "try: Run.create(sys.argv[1], {}, resume=True)\n"
        "except ConfigError as e: sys.exit(str(e))"
    )
    command = [sys.executable, "-c", code, str(run.path)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    held = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert held.returncode == 1 and "another process is training" in held.stderr
    path = run.path
    del run
    assert subprocess.run(command, env=environ).returncode == 0
    assert len(Run.open(path).versions()) == 2


def test_evaluations(tmp_path):
    run = Run.create(tmp_path, CONFIG)
    assert run.evaluations() == []
    for step in (10, 20, 30):
        run.add_evaluation({"step": step, "returns": [1.0, 0.5]})
    run.drop_evaluations_after(20)
    assert [row["step"] for row in Run.open(tmp_path).evaluations()] == [10, 20]
    run.evaluation.write_text("{}")
    with pytest.raises(ConfigError, match="array"):
        run.evaluations()


def test_environment_notes_the_git_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def git(*arguments):
        return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("a")
    git("add", "a")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a")
    assert environment()["git"]["cwd"] == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a").write_text("b")
    assert environment()["git"]["cwd"]["dirty"] is True


def test_config_survives_paths_and_numpy(tmp_path):
    import numpy as np

    run = Run.create(tmp_path, {"path": tmp_path, "lr": np.float32(0.5), "steps": np.int64(3)})
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored == run.config == {"path": str(tmp_path), "lr": 0.5, "steps": 3}
