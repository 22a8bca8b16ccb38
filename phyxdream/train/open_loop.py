"""How far a world model sees: sequences it never learned from, and its error once it is shown nothing but actions.

    filtered    the posterior's prediction of a step whose observation it was given
    open loop   shown `context` steps, then imagined under the actions that were taken
    frozen      the last observation shown, unchanged: the error of a model that predicts no change

Actions are drawn at random, so that sequences do not depend on the agent and agents can be compared on them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from phyxdream.agents import DreamerAgent
from phyxdream.envs.spaces import SEGMENTATION
from phyxdream.errors import ConfigError, EnvError, MissingDependency
from phyxdream.train.driver import Driver, make_env
from phyxdream.train.run import Run, write_json

Array = NDArray[Any]

CONTEXT, LENGTH, SEED = 5, 50, 20_000
AHEAD = (1, 5, 10, 20, 40)


@torch.no_grad()
def play(
    agent: DreamerAgent,
    sequences: int,
    length: int = LENGTH,
    seed: int = SEED,
    random: bool = False,
    segmentation: bool = False,
) -> tuple[dict[str, torch.Tensor], Array | None]:
    """The first steps of new episodes: a batch (T, B, ...) of observations, action and is_first, as a replay would
    return it, on the CPU. No episode ends before the last step.

    Args:
        agent: whose environments to make, and whose policy, without exploration, chooses.
        sequences: B.
        length: T at most.
        seed: of the environments and of what chooses.
        random: actions are drawn from the action space instead.
        segmentation: return the true masks (T, B, H, W) as well, where the environment knows them; None elsewhere.
    """
    env = None
    if segmentation:
        with contextlib.suppress(EnvError, MissingDependency):
            env = make_env(agent.config, num_envs=sequences, seed=seed, segmentation=True)
    env = env or make_env(agent.config, num_envs=sequences, seed=seed)
    try:
        driver, carry, generator = Driver(env), None, torch.Generator(agent.device).manual_seed(seed)
        space = env.single_action_space
        space.seed(seed)
        rows, masks = [], []
        while True:
            rows.append({name: driver.row[name] for name in (*agent.shapes, "action", "is_first")})
            masks.append(driver.info.get(SEGMENTATION))
            if len(rows) == length or driver.row["is_last"].any():
                break
            if random:
                action = np.stack([space.sample() for _ in range(sequences)])
            else:
                action, carry = agent.act(driver.row, driver.row["is_first"], carry, False, generator)
            driver.step(action)
    finally:
        env.close()
    batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    return batch, None if masks[0] is None else np.stack(masks)


@dataclass
class OpenLoopError:
    """Mean squared errors of predictions of one observation, by step: pictures in [0, 1], vectors as they are.

    Attributes:
        filtered, open_loop, frozen: (T,), averaged over sequences and over what an observation consists of.
        context: steps shown; `open_loop` and `frozen` predict from there on.
    """

    filtered: Array
    open_loop: Array
    frozen: Array
    context: int

    def ahead(self, steps: int) -> tuple[float, float, float]:
        """filtered, open loop and frozen, at the step that is `steps` beyond the last one shown."""
        at = self.context + steps - 1
        return float(self.filtered[at]), float(self.open_loop[at]), float(self.frozen[at])


@torch.no_grad()
def open_loop_error(
    agent: DreamerAgent, sequences: int = 32, length: int = LENGTH, context: int = CONTEXT, seed: int = SEED
) -> dict[str, OpenLoopError]:
    """Errors by observation, over `sequences` new episodes of random actions.

    Raises:
        ConfigError: a number is below 1; or the episodes are over before anything is imagined.
    """
    for name, value in dict(sequences=sequences, length=length, context=context).items():
        if value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")
    batch, _ = play(agent, sequences, length, seed, random=True)
    if len(batch["action"]) <= context:
        raise ConfigError(f"open loop: one of {sequences} random episodes is over after {len(batch['action'])} steps, "
                          f"of which {context} are shown: nothing is left to imagine")  # fmt: skip
    batch = {name: value.to(agent.device) for name, value in batch.items()}
    batch["action"] = agent.encode_action(batch["action"])
    model = agent.model.world_model

    def generator() -> torch.Generator:
        return torch.Generator(agent.device).manual_seed(seed)

    filtered = model.decoder(model.filter(batch, generator=generator()).feature)
    imagined = model.open_loop(batch, context, generator())
    out = {}
    for name in agent.shapes:
        truth = model.target(batch[name])
        predictions = filtered[name].mode, imagined[name], truth[context - 1]
        errors = [(x.float() - truth).square().flatten(1).mean(1).cpu().numpy() for x in predictions]
        out[name] = OpenLoopError(*errors, context)
    return out


def open_loop_table(errors: Mapping[str, OpenLoopError]) -> Table:
    """Errors some steps ahead, for people."""
    any_error = next(iter(errors.values()))
    context, length = any_error.context, len(any_error.filtered)
    ahead = [steps for steps in AHEAD if context + steps <= length]
    title = f"mean squared error after {context} steps shown, of {length}"
    table = Table(title=title, title_justify="left", box=None)
    for name in ("", "steps ahead", "filtered", "open loop", "frozen"):
        table.add_column(name, justify="left" if not name else "right")
    for name, error in errors.items():
        for steps in ahead:
            table.add_row(name if steps == ahead[0] else "", str(steps), *(f"{x:.3g}" for x in error.ahead(steps)))
    return table


def write_open_loop(run: Run, step: int, errors: Mapping[str, OpenLoopError]) -> None:
    """Write errors at every step, of the agent at environment step `step`, to open_loop.json of a run."""
    rows = {name: {k: np.asarray(v).tolist() for k, v in vars(error).items()} for name, error in errors.items()}
    write_json(run.path / "open_loop.json", {"step": step, "errors": rows})
