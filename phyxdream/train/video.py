"""What the model dreams: replayed sequences beside the model's open-loop prediction of them."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from phyxdream.agents import DreamerAgent
from phyxdream.replay import Replay

CONTEXT, LENGTH, SEQUENCES, CANDIDATES, SEED = 5, 50, 6, 64, 0


def open_loop_video(agent: DreamerAgent, replay: Replay) -> dict | None:
    """Arguments for the report's video panel: `truth` and `model` as uint8 (T, B, H, W, C), and the `context` length
    after which the model sees nothing but actions. None when there are no pictures, seen or predicted, or too few steps
    to show.

    Every sequence stays inside one episode: what the next one will look like cannot be told from actions.
    """
    pictures = [name for name, shape in agent.shapes.items() if len(shape) == 3]
    length = min(LENGTH, len(replay) // replay.num_envs)
    if not pictures or length < 2:
        return None
    batch = replay.sample(CANDIDATES, length, force_is_first=True)
    start, stop = _longest_episodes(batch["is_first"])
    chosen = torch.argsort(stop - start, descending=True, stable=True)[:SEQUENCES]
    length = int((stop - start)[chosen].min())
    if length < 2:
        return None
    rows = start[chosen] + torch.arange(length)[:, None]  # (T, B)
    batch = {name: batch[name][rows, chosen].to(agent.device) for name in (*agent.shapes, "action", "is_first")}
    batch["action"] = agent.encode_action(batch["action"])
    generator = torch.Generator(agent.device).manual_seed(SEED)
    context = min(CONTEXT, length // 2)
    model = agent.model.world_model.open_loop(batch, context, generator)
    name = next((name for name in pictures if name in model), None)
    if name is None:  # a world model without a decoder has nothing to show
        return None
    return {"truth": _frames(batch[name]), "model": _frames(model[name]), "context": context}


def _longest_episodes(is_first: Tensor) -> tuple[Tensor, Tensor]:
    """First row and end of the longest stretch without a reset inside, for each column of is_first (T, B)."""
    spans = []
    for column in is_first.T:
        cuts = [0, *(torch.nonzero(column[1:]).flatten() + 1).tolist(), len(column)]
        spans.append(max(itertools.pairwise(cuts), key=lambda span: span[1] - span[0]))
    start, stop = torch.tensor(spans).T
    return start, stop


def _frames(image: Tensor) -> np.ndarray:
    """(T, B, C, H, W) uint8 or [0, 1] to uint8 (T, B, H, W, C) with one or three channels."""
    image = image if image.dtype == torch.uint8 else (image.clamp(0, 1) * 255).round().to(torch.uint8)
    channels = 3 if image.shape[2] >= 3 else 1
    return image[:, :, :channels].movedim(2, -1).cpu().numpy()
