"""The RSSMs that the benches of scans and steps are about, by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from phyxdream import nn

ACTION = 6


@dataclass(frozen=True)
class Size:
    """`options` of `nn.RSSM`, and the batch that training replays: T steps of B sequences."""

    name: str
    label: str
    options: dict[str, Any] = field(hash=False)
    T: int = 64
    B: int = 16

    def model(self, device: torch.device) -> nn.RSSM:
        torch.manual_seed(0)
        return nn.RSSM(action_size=ACTION, **self.options).to(device)


_TINY = dict(embed_size=16, deter_size=16, hidden_size=16, stoch_size=4, classes=4)
_SMALL = dict(embed_size=1024, deter_size=200, hidden_size=200)
_BLOCKS = dict(embed_size=1024, cell="block_gru")

SIZES = (
    Size("tiny", "layernorm_gru 16, 4×4", _TINY, T=4, B=2),
    Size("v1", "gru 200, 30 Gaussians, embed 1024", dict(cell="gru", stoch_size=30, classes=0, **_SMALL)),
    Size("200", "layernorm_gru 200, 32×32, embed 1024", _SMALL),
    Size("512", "layernorm_gru 512, 32×32, embed 1024", dict(embed_size=1024)),
    Size("512-embed-4096", "layernorm_gru 512, 32×32, embed 4096", dict(embed_size=4096)),
    Size("12m", "block_gru 2048, 32×16, embed 1024", dict(deter_size=2048, classes=16, hidden_size=256, **_BLOCKS)),
    Size("50m", "block_gru 4096, 32×32, embed 1024", dict(deter_size=4096, classes=32, hidden_size=512, **_BLOCKS)),
)


def multiplications(model: nn.RSSM, without: str = "prior") -> int:
    """Of one posterior step of one sequence (or a prior step, `without` the posterior), in products with a matrix: of
    all weights of these parts but those that one-hot z multiplies, which pick rows."""
    left_out = (without, "cell.in_stoch.") if model.classes else (without,)
    return sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and not name.startswith(left_out))
