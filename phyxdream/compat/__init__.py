"""Our ops inside other people's Dreamers: `accelerate` for their modules, and a module for each codebase.

| module | codebase |
|---|---|
| `dreamerv3_torch` | NM512/dreamerv3-torch |
| `r2dreamer` | NM512/r2dreamer, and the λ-return of DreamerV3 in JAX |
| `sheeprl` | Eclectic-Sheep/sheeprl: DreamerV1, V2, V3 |
| `torchrl` | pytorch/rl: RSSMRolloutV3, RSSMPriorV3, lambda_target |
| `danijar` | danijar/dreamer and dreamerv2: their calls, on our RSSM |
| `rllib` | RLlib's DreamerV3 in torch |
| `checkpoints` | weights of dreamerv3-torch and r2dreamer in our agent |
| `sheeprl_replay`, `torchrl_replay` | our replay behind their buffers |
| `slot_attention` | slot attention modules after lucidrains/slot-attention |

None of these codebases needs to be installed.
"""

from __future__ import annotations

from phyxdream.compat.acceleration import Part, Summary, accelerate, restore

__all__ = ["Part", "Summary", "accelerate", "restore"]
