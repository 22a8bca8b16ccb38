"""Other ways to look at a sampled batch."""

from __future__ import annotations

import torch
from torch import Tensor


def n_step(batch: dict[str, Tensor], n: int, discount: float = 0.99) -> dict[str, Tensor | dict[str, Tensor]]:
    """The n-step transitions of a batch: from every step to the one n later, or to its episode's end before that.

    With a replay step holding the reward that came with its observation, the transition from t to t+m brings
    R = Σ_{k=1}^{m} discount**(k-1) · reward[t+k], where m ≤ n is the number of steps until the episode ends, and a
    value at t+m counts discount**m, or nothing if t+m is terminal.

    Args:
        batch: (T, B, ...) as `Replay.sample` gives it, T > n, with `reward` (T, B) and `is_first`; `is_last` and
            `is_terminal` are used if there.
        n: steps of a transition.
        discount: per step, in [0, 1].

    Returns:
        `first`: views (T-n, B, ...) of every key at t; `last`: the same keys at t+m, views where no episode ends
        within the batch, else gathered; `reward`: R, `discount`: the factor of the value at t+m, `steps`: m, each
        (T-n, B). A transition from the last step of an episode has m = 0: nothing happens in it, mask it by `steps`.

    Source: Watkins 1989; as in Hessel et al. 2018 (Rainbow).

    >>> batch = {"reward": torch.arange(5.0)[:, None], "is_first": torch.zeros(5, 1, dtype=torch.bool)}
    >>> n_step(batch, 2, discount=0.5)["reward"].flatten()
    tensor([2.0000, 3.5000, 5.0000])
    """
    if "reward" not in batch or "is_first" not in batch:
        raise ValueError(f"batch: got the keys {', '.join(batch)}, expected 'reward' and 'is_first' among them")
    reward, is_first = batch["reward"], batch["is_first"]
    T = len(reward)
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n < T:
        raise ValueError(f"n: got {n!r}, expected an integer from 1 to {T - 1} for a batch of {T} steps")
    if not 0 <= discount <= 1:
        raise ValueError(f"discount: got {discount!r}, expected a number in [0, 1]")
    over = batch["is_last"] if "is_last" in batch else torch.zeros_like(is_first)
    steps = torch.zeros_like(is_first[: T - n], dtype=torch.int64)
    total = torch.zeros_like(reward[: T - n])
    going = torch.ones_like(is_first[: T - n])
    for k in range(1, n + 1):
        going = going & ~over[k - 1 : T - n + k - 1] & ~is_first[k : T - n + k]
        total = total + torch.where(going, discount ** (k - 1) * reward[k : T - n + k], 0)
        steps += going
    tensors = {key: value for key, value in batch.items() if key not in ("probability", "consecutive")}
    if bool((steps == n).all()):
        last = {key: value[n:] for key, value in tensors.items()}
    else:
        at = torch.arange(T - n, device=steps.device)[:, None] + steps
        columns = torch.arange(steps.shape[1], device=steps.device)
        last = {key: value[at, columns] for key, value in tensors.items()}
    factor = discount ** steps.to(total.dtype)
    if "is_terminal" in batch:
        factor = factor * ~last["is_terminal"]
    return {"first": {key: value[: T - n] for key, value in tensors.items()}, "last": last,
            "reward": total, "discount": factor, "steps": steps}  # fmt: skip
