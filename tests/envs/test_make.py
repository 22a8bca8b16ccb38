import doctest
import subprocess
import sys

import pytest

from phyxdream import envs
from phyxdream.errors import EnvError, MissingDependency


def test_the_docstring_runs():
    assert doctest.testmod(envs).failed == 0


@pytest.mark.parametrize(
    ("id", "message"),
    [
        ("gym:Pendulm-v1", "did you mean 'Pendulum-v1'"),
        ("gym:Pendulum-v9", "'Pendulum-v1'"),
        ("Pendulum-v1", "no known prefix.*'gym:Pendulum-v1'"),
        ("gim:Pendulum-v1", "no known prefix.*'gym:Pendulum-v1'"),
        ("gym:", "no known prefix"),
        ("", "no known prefix"),
        (3, "id is 3"),
        ("unity:game.x86_64", "no such build"),
        ("gym:Blackjack-v1", "gym:Blackjack-v1: the observation has the space Tuple"),
    ],
)
def test_unknown_ids_name_the_nearest(id, message):
    with pytest.raises(EnvError, match=message):
        envs.make(id)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_envs": 0}, "num_envs is 0; expected an integer of at least 1"),
        ({"num_envs": 2.0}, "num_envs"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**31}, "seed"),
        ({"seed": None}, "seed"),
        ({"action_repeat": 0}, "action_repeat"),
        ({"time_limit": 0}, "time_limit"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": (64, 64, 3)}, "image_size"),
        ({"camera": 0}, "camera"),
        ({"gravitas": 1}, "gravitas"),
        ({"vectorization": "threads"}, "vectorization is 'threads'"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(EnvError, match=message):
        envs.make("gym:Pendulum-v1", **{"num_envs": 1, **arguments})


def test_pixels_false_insists_on_no_pictures():
    with pytest.raises(EnvError, match=r"pixels is False, but envpool:Catch-v0 observes .*image"):
        pytest.importorskip("envpool")
        envs.make("envpool:Catch-v0", pixels=False)


def test_backend_id():
    assert envs.backend_id("gym", "Pendulum-v1") == "gym:Pendulum-v1"
    assert envs.backend_id("gym", "gym:Pendulum-v1") == "gym:Pendulum-v1"
    assert envs.backend_id("gym", "ale_py:ALE/Pong-v5") == "gym:ale_py:ALE/Pong-v5"
    assert envs.backend_id("unity_mlagents", "game.x86_64") == "unity:game.x86_64"
    with pytest.raises(EnvError, match="did you mean 'envpool'"):
        envs.backend_id("envpol", "Catch-v0")
    with pytest.raises(EnvError, match="agree"):
        envs.backend_id("gym", "envpool:Catch-v0")


def test_list_ids():
    assert "gym:Pendulum-v1" in envs.list_ids("gym")
    with pytest.raises(EnvError, match="'nope'"):
        envs.list_ids("nope")


def test_without_envpool_only_its_ids_are_missing():
    code = """
import sys
sys.modules["envpool"] = None  # as if not installed
from phyxdream import envs
from phyxdream.errors import MissingDependency
envs.make("gym:Pendulum-v1", num_envs=1).close()
try:
    envs.make("envpool:Catch-v0")
except MissingDependency as error:
    print(error)
try:
    envs.make("Pendulum-v1")
except envs.EnvError as error:
    print(error)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    assert "pip install envpool" in child.stdout and "'gym:Pendulum-v1'" in child.stdout


@pytest.mark.parametrize(("module", "id"), [("dm_control", "dmc:walker_walk"), ("gymnasium_robotics", "robotics:X-v1")])
def test_missing_packages_are_named(monkeypatch, module, id):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match="pip install"):
        envs.make(id)
