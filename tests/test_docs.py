"""What the documentation shows runs: every docstring example, and every Python block of the README."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import phyxdream

ROOT = Path(__file__).parent.parent
MODULES = [
    "phyxdream",
    *(m.name for m in pkgutil.walk_packages(phyxdream.__path__, "phyxdream.") if "_C" not in m.name),
]
NEEDS = {
    "phyxdream.kernels": "triton",
    "phyxdream.envs.dmc": "dm_control",
    "phyxdream.envs.robotics": "gymnasium",
    "phyxdream.compat.torchrl_replay": "tensordict",
}


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    for prefix, package in NEEDS.items():
        if name.startswith(prefix):
            pytest.importorskip(package)
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
def test_readme_block(block, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if "envpool:" in block:
        pytest.importorskip("envpool")
    trained = []
    # A million steps are not for a test; that training works is shown in test_loop.py.
    monkeypatch.setattr(phyxdream.agents.DreamerAgent, "train", lambda agent: trained.append(agent.config.env_id))
    exec(compile(block, "README.md", "exec"), {})
    assert trained == (["gym:Pendulum-v1"] if "agent.train()" in block else [])


def test_readme_links_and_pictures_exist():
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r'src="([^":]+)"', text)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target
    assert "@@" not in text


def test_readme_has_exactly_the_two_set_up_commands():
    commands = [line.strip() for line in (ROOT / "README.md").read_text().splitlines() if "pip install -c" in line]
    assert commands == [
        "pip install -c constraints.txt . && phyxdream train",
        "pip install -c constraints.txt '.[test]' && pytest -n auto",
    ]
