"""`DreamerAgent`: a model of the family together with its optimiser, randomness and the environment's spaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from phyxdream import distributed
from phyxdream.agents.config import DreamerConfig
from phyxdream.agents.daydreamer import DayDreamer
from phyxdream.agents.dreamer_v1 import DreamerV1
from phyxdream.agents.dreamer_v2 import DreamerV2
from phyxdream.agents.dreamer_v3 import DreamerV3
from phyxdream.agents.dreaming import Dreaming, DreamingV2
from phyxdream.agents.graphed import Graphed
from phyxdream.agents.learner import Learner
from phyxdream.agents.phyxdream import PhyXDreamer, Planning
from phyxdream.agents.planet import PlaNet
from phyxdream.agents.world_models import WorldModels
from phyxdream.errors import CheckpointError, ConfigError, EnvError
from phyxdream.nn.rssm import State

if TYPE_CHECKING:
    from phyxdream.train.loop import TrainResult

FLAGS = ("is_first", "is_last", "is_terminal")
# Names that replay steps, replayed batches and losses use beside the observations'.
RESERVED = (*FLAGS, "action", "reward", "deter", "stoch", "slots", "step_id", "probability", "mask", "consecutive",
            "dynamics", "representation", "continue", "actor", "critic", "replay_critic", "contrastive", "overshooting",
            "total")  # fmt: skip


DESIGNS = {"dreamer_v1": DreamerV1, "dreamer_v2": DreamerV2, "dreamer_v3": DreamerV3, "planet": PlaNet,
           "dreaming": Dreaming, "dreaming_v2": DreamingV2, "daydreamer": DayDreamer,
           "world_models": WorldModels}  # fmt: skip


@dataclass
class Carry:
    """What acting remembers between steps: the model state (N, ...) and the last action (N, A)."""

    state: State
    action: Tensor


@dataclass
class Update:
    """What one gradient step gave.

    Attributes:
        metrics: 0-d tensors.
        latents: the new states of the steps learned from, for `Replay.update`: deter (T, B, D) and stoch (T, B, S);
            empty with `replay_context=0`.
        model_loss: (T, B) float, the world model's loss at each of these steps, for `Replay.prioritize`.
    """

    metrics: dict[str, Tensor]
    latents: dict[str, Tensor]
    model_loss: Tensor


class DreamerAgent:
    """An agent that learns a world model and, inside it, its behaviour.

    Args:
        config: a `DreamerConfig`; resolved and checked here.
        observation_space, action_space: of one environment, as `envs.make(...)` gives them; looked up from
            `config.env` when left out.

    Raises:
        ConfigError: for a value out of range; EnvError: for an environment or space that cannot be handled.

    >>> from phyxdream import DreamerAgent, DreamerConfig
    >>> agent = DreamerAgent(DreamerConfig(env="gym:CartPole-v1", size="1m"))
    >>> agent.action_size, agent.discrete
    (2, True)
    """

    def __init__(
        self,
        config: DreamerConfig,
        observation_space: gymnasium.spaces.Dict | None = None,
        action_space: gymnasium.Space | None = None,
    ):
        self.config = config.resolve()
        if observation_space is None or action_space is None:
            from phyxdream.train.driver import make_env

            env = make_env(self.config, num_envs=1)
            observation_space, action_space = env.single_observation_space, env.single_action_space
            env.close()
        _check_spaces(observation_space, action_space)
        self.observation_space, self.action_space = observation_space, action_space
        self.discrete = isinstance(action_space, gymnasium.spaces.Discrete)
        self.action_size = int(action_space.n) if self.discrete else int(np.prod(action_space.shape))
        if not self.discrete and self.config.actor_dist == "categorical":
            raise ConfigError("actor_dist: 'categorical' needs discrete actions, the environment's are continuous")
        if self.discrete and self.config.actor_dist not in (None, "categorical"):
            raise ConfigError(f"actor_dist: {self.config.actor_dist!r} needs continuous actions, the environment's "
                              "are discrete")  # fmt: skip
        self.shapes = {name: space.shape for name, space in observation_space.spaces.items()}
        self.device = resolve_device(self.config.device)
        # Building the nets must neither depend on nor disturb the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.config.seed)  # torch.manual_seed would reseed the GPUs as well
            self.model = self.make_model().to(self.device)
        self.optimizer = self.model.make_optimizer()
        seed = distributed.own_seed(self.config.seed)
        self.generators = {
            name: torch.Generator(self.device).manual_seed(seed * 2 + offset)
            for offset, name in enumerate(("learn", "act"))
        }
        self._start_updates()

    # -----------------------------------------------------------------------------------------------------------------

    def make_model(self) -> Learner:
        """The learned parts, which another kind of agent makes otherwise."""
        c, design = self.config, DESIGNS[self.config.agent]
        if design is DreamerV3 and c.behaviour == "planner":
            design = Planning
        elif c.slot_mode:
            design = PhyXDreamer
        return design(self.config, self.shapes, self.action_size, self.discrete)

    @property
    def replay_spec(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """What one replay step holds, for `Replay(spec=...)`."""
        spaces = self.observation_space.spaces
        observation = {name: (space.shape, str(space.dtype)) for name, space in spaces.items()}
        action = ((), "int32") if self.discrete else ((self.action_size,), "float32")
        return observation | {"action": action, "reward": ((), "float32")} | {name: ((), "bool") for name in FLAGS}

    @property
    def latent_spec(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """What a replay keeps of the state at each step, for `Replay(latents=...)`; empty if `replay_context=0`."""
        return self.model.world_model.latent_spec if self.config.replay_context else {}

    def latents(self, carry: Carry) -> dict[str, Tensor]:
        """The states of a carry as `latent_spec` says, (N, ...) on the CPU, for `Replay.add`."""
        if not self.config.replay_context:
            return {}
        return {name: value.cpu() for name, value in self.model.world_model.pack(carry.state).items()}

    def update(self, batch: Mapping[str, Tensor]) -> Update:
        """One gradient step on a replayed batch, as `Replay.sample` returns it.

        With latents the batch is (K+T, B, ...): its first K = `config.replay_context` steps only tell the state from
        which the other T are learned. Without, it is (T, B, ...) and starts from the initial state.
        """
        names = (*self.replay_spec, *self.latent_spec)
        return Update(*self._run_update({name: batch[name] for name in names if name in batch}))

    def _update(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """The fields of an `Update`. Nothing here waits for the device, so that a CUDA graph can hold it."""
        batch = {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}
        batch["action"] = self.encode_action(batch["action"])
        if self.config.clip_rewards:
            batch["reward"] = getattr(torch, self.config.clip_rewards)(batch["reward"])
        loss = self.model.loss(batch, self.generators["learn"])
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        distributed.average_gradients(self.model.parameters())
        metrics = {**loss.metrics, "grad_norm": self.optimizer.step(), "loss/total": loss.total.detach()}
        self.model.after_update()
        latents = self.model.world_model.pack(loss.post) if self.config.replay_context else {}
        return metrics, latents, loss.model_loss

    def _start_updates(self) -> None:
        """Choose how updates run; again after tensors were replaced, whose addresses a graph has.

        Updates in which several processes take part are not recorded.
        """
        wanted = self.device.type == "cuda" and self.config.cuda_graph and distributed.world_size() == 1
        graphed = wanted and self.model.recordable
        learn = self.generators["learn"]
        self._run_update = Graphed(self._update, (learn,), self.device) if graphed else self._update

    @torch.no_grad()
    def act(
        self,
        observation: Mapping[str, np.ndarray],
        is_first: np.ndarray,
        carry: Carry | None = None,
        explore: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[np.ndarray, Carry]:
        """Actions for N environments: observations (N, *shape), is_first (N,) bool.

        Returns the actions as the environment takes them, (N,) int64 or (N, A) float32, and the carry for the next
        call. `explore=False` takes the most likely action. `generator` replaces the agent's own random numbers.
        """
        N = len(is_first)
        self._check_observation(observation, N)
        tensors = {name: torch.as_tensor(observation[name], device=self.device) for name in self.shapes}
        first = torch.as_tensor(is_first, device=self.device)
        last = torch.zeros(N, self.action_size, device=self.device) if carry is None else carry.action
        state = None if carry is None else carry.state
        action, state = self.model.policy(tensors, last, first, state, generator or self.generators["act"], explore)
        chosen = action.argmax(-1).cpu().numpy() if self.discrete else action.float().clamp(-1, 1).cpu().numpy()
        return chosen, Carry(state, self.encode_action(torch.as_tensor(chosen, device=self.device)))

    def encode_action(self, action: Tensor) -> Tensor:
        """Actions as stored, (...,) integers or (..., A) floats, as the model takes them: (..., A) float32."""
        return F.one_hot(action.long(), self.action_size).float() if self.discrete else action.float()

    def _check_observation(self, observation: Mapping[str, Any], N: int) -> None:
        for name, shape in self.shapes.items():
            if name not in observation:
                raise EnvError(f"observation: missing {name!r}, got {sorted(observation)}")
            if tuple(observation[name].shape) != (N, *shape):
                raise EnvError(f"observation {name!r}: expected shape {(N, *shape)} for is_first of length {N}, got "
                               f"{tuple(observation[name].shape)}")  # fmt: skip

    # -----------------------------------------------------------------------------------------------------------------

    def train(self, resume: bool = False, quiet: bool = False) -> TrainResult:
        """Run the training loop to `config.total_steps`: environments, replay, checkpoints, metrics, report."""
        from phyxdream.train.loop import train

        return train(self, resume=resume, quiet=quiet)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything `load_tensors` needs to go on exactly here, grouped by file."""
        groups = self.optimizer.state_dict()["state"]
        optimizer = {f"{i}/{name}": value for i, state in groups.items() for name, value in state.items()}
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": {**optimizer, "step": torch.tensor(int(self.optimizer.param_groups[0]["step"]))},
            "generators": {name: generator.get_state() for name, generator in self.generators.items()},
        }

    def load_tensors(self, tensors: Mapping[str, Mapping[str, Tensor]], weights_only: bool = False) -> None:
        """Restore what `tensors` gave; `weights_only` leaves optimiser and random numbers alone.

        Raises CheckpointError when the weights belong to another architecture.
        """
        own, given = self.model.state_dict(), tensors["model"]
        missing, foreign = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
        shapes = [n for n in own.keys() & given.keys() if own[n].shape != given[n].shape]
        if missing or foreign or shapes:
            name = (missing or foreign or sorted(shapes))[0]
            what = "is missing" if missing else "is unknown" if foreign else (
                f"has shape {tuple(given[name].shape)}, expected {tuple(own[name].shape)}")  # fmt: skip
            raise CheckpointError(f"checkpoint: weights do not fit this configuration ({name} {what})")
        self.model.load_state_dict(given)
        if weights_only:
            return
        state: dict[int, dict[str, Tensor]] = {}
        optimizer = dict(tensors["optimizer"])
        step = int(optimizer.pop("step"))
        for key, value in optimizer.items():
            index, name = key.split("/")
            state.setdefault(int(index), {})[name] = value.clone()  # the optimiser keeps what it is given
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": [{**g, "step": step} for g in groups]})
        for name, generator in self.generators.items():
            generator.set_state(tensors["generators"][name].cpu())
        self._start_updates()

    def load(self, path: str | Path) -> DreamerAgent:
        """Take the weights of a run directory's newest checkpoint (or of one checkpoint directory)."""
        from phyxdream.train import checkpoint
        from phyxdream.train.run import Run

        path = Path(path)
        is_checkpoint = (path / "manifest.json").exists()
        found = checkpoint.load(path) if is_checkpoint else checkpoint.load_latest(Run.open(path))
        self.load_tensors(found.tensors, weights_only=True)
        return self


def _check_spaces(observation: gymnasium.Space, action: gymnasium.Space) -> None:
    if not isinstance(observation, gymnasium.spaces.Dict):
        raise EnvError(f"observation_space: expected a Dict of pictures and vectors, got {observation}")
    for name in observation.spaces:
        if name in RESERVED:
            raise EnvError(f"observation {name!r}: this name is reserved for the model's own use; rename it")
    if not isinstance(action, (gymnasium.spaces.Discrete, gymnasium.spaces.Box)):
        raise EnvError(f"action_space: expected Discrete or Box, got {action}")
    if isinstance(action, gymnasium.spaces.Discrete) and action.start:
        raise EnvError(f"action_space: expected a Discrete that starts at 0, got start={action.start}")


def resolve_device(name: str) -> torch.device:
    """The device that `config.device` asks for; each of several processes on a machine has a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {name!r} was asked for, but no CUDA device is available")
    if device.type == "cuda" and distributed.world_size() > 1:
        if device.index is not None:
            raise ConfigError(f"device: expected 'auto', 'cpu' or 'cuda' with several processes, each of which takes a "
                              f"GPU of its own, got {name!r}")  # fmt: skip
        return torch.device("cuda", distributed.own_gpu())
    return device
