"""Slots learn objects from pictures of sprites alone: trains `nn.SlotAutoencoder` and scores it against true masks.

    loss    = Σ (picture − Σ_k mask_k · colour_k)² + balance · Σ_k (share of the picture with mask_k)²
    FG-ARI  = do pixels of one object go to one slot, and those of two objects to two?    on scenes never trained on

No mask is ever shown. Source: Locatello et al., "Object-Centric Learning with Slot Attention", 2020, with scenes, sizes
and a schedule for which two CPU cores are enough. The second term is ours: on plain backgrounds, with some seeds and
not with others, one slot takes the whole background, and its mask then cuts into objects for as long as their shapes
are painted roughly.

>>> config = SlotsConfig(steps=100, slots=3)
>>> [round(learning_rate(config, step), 6) for step in (0, 50, 99)]
[1e-05, 0.00051, 4e-05]
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from phyxdream import nn
from phyxdream.agents.dreamer import resolve_device
from phyxdream.envs.sprites import SpriteScenes
from phyxdream.errors import ConfigError, PhyxdreamError
from phyxdream.nn.vision import as_float_image
from phyxdream.train import metrics, slot_metrics
from phyxdream.train.loop import catch_signals
from phyxdream.train.memory import keep_freed_memory
from phyxdream.train.metrics import Metrics
from phyxdream.train.progress import Progress
from phyxdream.train.report import INK, LEGEND, dress, figure_png, png
from phyxdream.train.report_slots import SlotView, sharpness, slot_sheet
from phyxdream.train.run import Run, environment, write_json

WARMUP, DECAY, CLIP = 100, 0.25, 1.0
SHOWN = 12
_HELD_OUT_SEED = 0  # training scenes have larger ones
_CHUNK = 64


@dataclass
class SlotsConfig:
    """Train a slot autoencoder on scenes of sprites, and score its masks against the true ones."""

    out: str = ""
    """Directory to write to, new or empty; by default runs/slots-<date and time>."""
    seed: int = 0
    """Of weights, scenes and noise. Held-out scenes are the same for all seeds."""
    steps: int = 10_000
    """Gradient steps. The learning rate falls to 0 over the last quarter of them."""
    batch_size: int = 32
    learning_rate: float = 1e-3
    log_every: int = 250
    """Steps between scores on held-out scenes."""
    held_out: int = 320
    """Scenes to score on."""
    size: int = 32
    """Height and width of the pictures."""
    sprites: tuple[int, int] = (3, 3)
    """Fewest and most in a scene."""
    texture: bool = False
    """A gentle pattern on the background."""
    slots: int = 5
    slot_size: int = 64
    hidden_size: int = 128
    """Of the MLP inside slot attention."""
    iterations: int = 3
    initial: Literal["gaussian", "learned"] = "gaussian"
    """Where slots start: gaussian (drawn anew for every picture) or learned (one start for each)."""
    depth: int = 32
    """Channels of the encoder's convolutions."""
    layers: int = 3
    """How many convolutions."""
    stride: int = 2
    """Of the first one: 2 leaves a quarter of the tokens."""
    token_size: int = 64
    decoder_size: int = 128
    patch: int = 4
    """Side of the patches that the decoder paints."""
    l1: float = 0.0
    """λ of the loss: squared error + λ · absolute error."""
    balance: float = 10.0
    """Weight of Σ_k (share of the picture that slot k paints)², for pictures of 32×32 and in proportion to pixels:
    slots share the background. With 0, one slot may take all of it and, with it, the edges of objects."""
    device: str = "auto"
    """cpu, cuda, or auto: CUDA where there is one."""
    quiet: bool = False
    """No progress display."""

    def check(self) -> None:
        """Raise ConfigError for a number out of range; the model and the scenes check their own."""
        for name, least in dict(seed=0, steps=1, batch_size=1, log_every=1, held_out=1).items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        for name, weight in dict(l1=self.l1, balance=self.balance).items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ConfigError(f"{name}: expected at least 0, got {weight}")


@dataclass
class SlotsResult:
    """What `train_slots` leaves behind: where, after how many steps, the scores then, the signal that stopped it."""

    path: Path
    steps: int
    scores: dict[str, float]
    signal: int | None = None


def learning_rate(config: SlotsConfig, step: int) -> float:
    """Of gradient step 0 .. steps − 1: rises linearly, stays, falls linearly towards 0."""
    rise, fall = (step + 1) / WARMUP, (config.steps - step) / (DECAY * config.steps)
    return config.learning_rate * min(1.0, rise, fall)


def unevenness(masks: Tensor) -> Tensor:
    """Σ_k (share of the picture with mask k)² · pixels / 1024, the mean over pictures, 0-d.

    Args:
        masks: (B, K, H, W), which sum to 1 over slots.
    """
    return masks.mean((-2, -1)).square().sum(-1).mean() * (masks[0, 0].numel() / 1024)


class SlotTrainer:
    """A model with its optimiser, and the scenes it learns from and is scored on.

    Raises:
        ConfigError: an option is out of range.

    >>> tiny = SlotsConfig(steps=2, batch_size=2, held_out=4, size=16, slots=3, slot_size=8, depth=4, token_size=8)
    >>> trainer = SlotTrainer(tiny)
    >>> float(trainer.step(trainer.batch(0))) > 0
    True
    >>> sorted(trainer.score())[:4]
    ['ARI', 'FG-ARI', 'collapsed', 'loss/held-out']
    """

    def __init__(self, config: SlotsConfig):
        c = self.config = config
        c.check()
        self.device, self.steps = resolve_device(c.device), 0
        scene = dict(size=c.size, sprites=tuple(c.sprites), texture=c.texture)
        try:
            self.scenes = SpriteScenes(c.batch_size, seed=_HELD_OUT_SEED + 1 + c.seed, **scene)
            self.held_out = SpriteScenes(c.held_out, seed=_HELD_OUT_SEED, **scene).batch(0)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(c.seed)
            self.model = nn.SlotAutoencoder(
                (3, c.size, c.size), c.slots, c.slot_size, c.hidden_size, c.iterations, l1=c.l1,
                decoder_size=c.decoder_size, patch=c.patch, initial=c.initial, depth=c.depth, layers=c.layers,
                stride=c.stride, token_size=c.token_size,
            ).to(self.device)  # fmt: skip
        self.noise = torch.Generator(self.device).manual_seed(c.seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), c.learning_rate)

    def batch(self, index: int) -> Tensor:
        """Training pictures (B, 3, S, S) in [0, 1]."""
        return _on(self.device, self.scenes.batch(index)["image"])

    def step(self, image: Tensor) -> Tensor:
        """One gradient step; returns the loss of pictures before it, summed over their pixels, as a 0-d tensor."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.steps)
        mixture = self.model(image, generator=self.noise).mixture
        loss = mixture.loss(image).mean()
        self.optimizer.zero_grad(set_to_none=True)
        (loss + self.config.balance * unevenness(mixture.masks)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.steps += 1
        return loss.detach()

    @torch.no_grad()
    def explain(self, first: int = 0, count: int | None = None) -> tuple[SlotView, float]:
        """What slots make of held-out scenes, which stand as the frames (T) of one sequence, and the mean loss.

        Slots start from the same noise at every call.
        """
        generator = torch.Generator(self.device).manual_seed(_HELD_OUT_SEED)
        parts, loss, images = [], 0.0, self.held_out["image"][first : count and first + count]
        for at in range(0, len(images), _CHUNK):
            image = _on(self.device, images[at : at + _CHUNK])
            mixture = self.model(image, generator=generator).mixture
            loss += float(mixture.loss(image).sum())
            parts.append((mixture.pictures.cpu(), mixture.masks.cpu()))
        pictures, masks = (torch.cat(part).unsqueeze(1).numpy() for part in zip(*parts, strict=True))
        return SlotView(pictures, masks), loss / len(images)

    def score(self) -> dict[str, float]:
        """Of held-out scenes: `slot_metrics.summary`, without what single pictures lack, sharpness, and the loss."""
        view, loss = self.explain()
        scores = slot_metrics.summary(view.masks, self.held_out["mask"][:, None])
        del scores["identity switches"]
        sharp = np.nanmean(sharpness(view.model, self._truth()))
        return {**scores, "sharpness": float(sharp), "loss/held-out": loss}

    def sheet(self) -> np.ndarray:
        """Held-out scenes to the right, below each what every slot paints: a uint8 image (height, width, 3)."""
        view, _ = self.explain(0, SHOWN)
        picture = self._truth(SHOWN)
        return slot_sheet(picture, view, len(picture), self.held_out["mask"][:SHOWN, None])

    def _truth(self, count: int | None = None) -> np.ndarray:
        """Held-out pictures in [0, 1] as frames of one sequence, (N, 1, 3, S, S)."""
        return _on(torch.device("cpu"), self.held_out["image"][:count, None]).numpy()


def train_slots(config: SlotsConfig) -> SlotsResult:
    """Train to `config.steps`, and write to `config.out`:

    config.json (options, versions, command), metrics.jsonl and tensorboard/ (scores over time), scores.json (at the
    end), curve.png, slots.png, model.safetensors. Ctrl-C and SIGTERM finish the step at hand and write it all, too.

    Raises:
        ConfigError: an option or the directory cannot be used. PhyxdreamError: a file could not be written.
        FloatingPointError: the loss is no longer finite.
    """
    keep_freed_memory()
    trainer = SlotTrainer(config)
    path = Path(config.out or f"runs/slots-{datetime.datetime.now():%Y%m%d-%H%M%S}").expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise ConfigError(f"out: {path} is not empty; choose another directory")
        write_json(path / "config.json", {**asdict(config), "environment": environment()})
    except OSError as error:
        raise ConfigError(f"out: cannot write to {path}: {error.strerror or error}") from error
    log = Metrics(Run(path, asdict(config)))
    with log, catch_signals() as received, Progress(
        config.steps * config.batch_size, title="slots", unit="pictures", mode="silent" if config.quiet else "auto"
    ) as progress:  # fmt: skip
        scores, window = trainer.score(), []
        log.log(0, scores)
        while trainer.steps < config.steps and not received:
            window.append(trainer.step(trainer.batch(trainer.steps)))
            progress.update(trainer.steps * config.batch_size, updates=trainer.steps)
            if trainer.steps % config.log_every == 0 or trainer.steps == config.steps or received:
                loss = float(torch.stack(window).mean())
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss became {loss} within the steps before {trainer.steps}")
                scores, window = trainer.score(), []
                log.log(trainer.steps, {"loss/training": loss, **scores})
                progress.update(trainer.steps * config.batch_size, loss=loss, **{"FG-ARI": scores["FG-ARI"]})
        seconds = log.elapsed
    _write(path, trainer, {"steps": trainer.steps, "seconds": round(seconds, 1), "scenes": config.held_out, **scores})
    return SlotsResult(path, trainer.steps, scores, received[0] if received else None)


def _write(path: Path, trainer: SlotTrainer, summary: Mapping[str, Any]) -> None:
    weights = {name: value.detach().cpu().contiguous() for name, value in trainer.model.state_dict().items()}
    figure = curve_figure({f"seed {trainer.config.seed}": metrics.read(path / "metrics.jsonl")})
    try:
        (path / "model.safetensors").write_bytes(save(weights))
        write_json(path / "scores.json", dict(summary))
        (path / "curve.png").write_bytes(figure_png(figure, 110))
        (path / "slots.png").write_bytes(png(Image.fromarray(trainer.sheet())))
    except OSError as error:
        raise PhyxdreamError(f"could not write to {path}: {error.strerror or error}") from error


def curve_figure(runs: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """FG-ARI, mask IoU and the loss on held-out scenes by gradient steps, a line for each run.

    Args:
        runs: columns as from `metrics.read`, by the name of the run.
    """
    figure = Figure(figsize=(9.6, 2.8), layout="constrained")
    grid = figure.subplots(1, 3)
    for axes, name in zip(grid, ("FG-ARI", "mask IoU", "loss/held-out"), strict=True):
        dress(axes)
        for (run, columns), colour in zip(runs.items(), (INK["accent"], INK["second"], INK["muted"]), strict=False):
            axes.plot(columns["step"], columns[name], color=colour, linewidth=1.6, label=run)
        axes.set_xlabel("gradient steps", color=INK["muted"], fontsize=9)
        axes.set_ylabel(name, color=INK["muted"], fontsize=9)
    for axes in grid[:2]:
        axes.set_ylim(-0.02, 1)
    grid[2].set_ylabel("loss", color=INK["muted"], fontsize=9)
    grid[2].set_yscale("log")
    grid[2].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    grid[2].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    grid[2].yaxis.set_minor_formatter(NullFormatter())
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, **LEGEND)
    return figure


def _on(device: torch.device, image: np.ndarray) -> Tensor:
    return as_float_image(torch.from_numpy(image).to(device))
