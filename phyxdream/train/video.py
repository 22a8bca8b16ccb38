"""What the model dreams: replayed sequences beside the model's open-loop prediction of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from phyxdream.agents import DreamerAgent
from phyxdream.replay import Replay

CONTEXT, LENGTH, SEQUENCES, SEED = 5, 50, 6, 0


def open_loop_video(agent: DreamerAgent, replay: Replay) -> dict | None:
    """Arguments for the report's video panel: `truth` and `model` as uint8 (T, B, H, W, C), and the `context` length
    after which the model sees nothing but actions. None when there are no pictures, or too few steps to show."""
    pictures = [name for name, shape in agent.shapes.items() if len(shape) == 3]
    length = min(LENGTH, min(len(replay) // replay.num_envs, LENGTH))
    if not pictures or length <= CONTEXT or not replay.num_sequences(length):
        return None
    batch = {k: v.to(agent.device) for k, v in replay.sample(SEQUENCES, length).items()}
    batch["action"] = agent.encode_action(batch["action"])
    generator = torch.Generator(agent.device).manual_seed(SEED)
    model = agent.model.world_model.open_loop(batch, CONTEXT, generator)
    name = pictures[0]
    return {"truth": _frames(batch[name]), "model": _frames(model[name]), "context": CONTEXT}


def _frames(image: Tensor) -> np.ndarray:
    """(T, B, C, H, W) uint8 or [0, 1] to uint8 (T, B, H, W, C) with one or three channels."""
    image = image if image.dtype == torch.uint8 else (image.clamp(0, 1) * 255).round().to(torch.uint8)
    channels = 3 if image.shape[2] >= 3 else 1
    return image[:, :, :channels].movedim(2, -1).cpu().numpy()
