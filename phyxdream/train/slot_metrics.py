"""Whether slots found objects: scores against true masks, and what slots do by themselves.

True masks are integers (..., H, W), 0 for the background and one number per object. Slots are soft masks
(..., K, H, W), as a decoder's alphas or an encoder's attention; a pixel belongs to the slot of the largest. NumPy
arrays and torch tensors are taken, float64 arrays (...) come back, with NaN where there was nothing to score.

>>> import numpy as np
>>> truth = np.array([[[0, 0, 1, 1], [0, 0, 2, 2]]])
>>> slots = np.eye(3)[truth][..., [2, 0, 1]].transpose(0, 3, 1, 2)  # the same segments, in another order
>>> foreground_ari(truth, slots), mask_iou(truth, slots), used_slots(slots)
(array([1.]), array([1.]), array([3]))
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LEAST = 0.01
"""Share of a picture's pixels that a slot must win to count as used."""
PART = 0.1
"""Share of an object's pixels that a slot must hold to count as a part of it."""


def segments(masks: Any) -> Array:
    """Which slot each pixel belongs to: (..., K, H, W) to integers (..., H, W) from 0 to K - 1."""
    return _masks(masks).argmax(-3)


def contingency(truth: Any, masks: Any) -> Array:
    """Pixels that an object and a slot share: (..., H, W) and (..., K, H, W) to counts (..., O, K).

    O is the largest number in `truth` plus 1; row 0 is the background's.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    truth, masks = _array(truth), _masks(masks)
    if not np.issubdtype(truth.dtype, np.integer) or truth.min(initial=0) < 0:
        raise ValueError(f"truth: expected integers of at least 0, got {truth.dtype} from {truth.min(initial=0)}")
    if truth.shape != (*masks.shape[:-3], *masks.shape[-2:]):
        raise ValueError(
            f"truth: expected (..., H, W) = {(*masks.shape[:-3], *masks.shape[-2:])} for masks (..., K, H, W) = "
            f"{masks.shape}, got {truth.shape}"
        )
    lead, K, O = masks.shape[:-3], masks.shape[-3], int(truth.max(initial=0)) + 1
    frames = int(np.prod(lead, dtype=int))
    pair = truth.astype(np.int64) * K + segments(masks)
    pair = pair.reshape(frames, -1) + np.arange(frames)[:, None] * (O * K)
    return np.bincount(pair.ravel(), minlength=frames * O * K).reshape(*lead, O, K)


def adjusted_rand_index(truth: Any, masks: Any) -> Array:
    """Agreement of pairs of pixels, in one segment or in two, corrected for chance: 1 is equal, 0 is chance.

    Hubert and Arabie, *Comparing partitions*, Journal of Classification 2, 1985.
    """
    return _ari(contingency(truth, masks))


def foreground_ari(truth: Any, masks: Any) -> Array:
    """FG-ARI: the adjusted Rand index of the true objects' pixels alone, whatever is done with the background.

    Greff et al., *Multi-object representation learning with iterative variational inference* (IODINE), 2019. With one
    object in the picture it is 1 or 0: whole or split. NaN where no object is visible.
    """
    return _ari(contingency(truth, masks)[..., 1:, :])


def _ari(table: Array) -> Array:
    table = table.astype(np.float64)
    a, b, n = table.sum(-1), table.sum(-2), table.sum((-2, -1))

    def pairs(count: Array) -> Array:
        return count * (count - 1)

    together, in_truth, in_slots = pairs(table).sum((-2, -1)), pairs(a).sum(-1), pairs(b).sum(-1)
    chance = in_truth * in_slots / np.maximum(pairs(n), 1)
    gain, most = together - chance, (in_truth + in_slots) / 2 - chance
    # Nothing to gain: both put all pixels together, or none.
    score = np.divide(gain, most, out=np.ones_like(gain), where=most != 0)
    return np.where(n > 0, score, np.nan)


def overlaps(truth: Any, masks: Any) -> Array:
    """Intersection over union of every object with every slot: (..., O - 1, K), NaN for objects not visible."""
    table = contingency(truth, masks).astype(np.float64)
    union = table.sum(-1, keepdims=True) + table.sum(-2, keepdims=True) - table
    iou = np.divide(table, union, out=np.zeros_like(table), where=union > 0)
    return np.where(table.sum(-1, keepdims=True) > 0, iou, np.nan)[..., 1:, :]


def mask_iou(truth: Any, masks: Any) -> Array:
    """Mean intersection over union of the visible objects, each with a slot of its own, matched for the best sum.

    An object for which no slot is left scores 0. The matching is Kuhn's (*The Hungarian method for the assignment
    problem*, 1955).
    """
    iou = overlaps(truth, masks)
    scores = np.full(iou.shape[:-2], np.nan)
    for at in np.ndindex(scores.shape):
        table = iou[at][~np.isnan(iou[at][:, 0])] if iou.shape[-2] else iou[at]
        if len(table):
            rows, columns = assignment(-table)
            scores[at] = table[rows, columns].sum() / len(table)
    return scores


def mean_best_overlap(truth: Any, masks: Any) -> Array:
    """mBO: mean over the visible objects of the best intersection over union with any slot.

    Pont-Tuset et al., *Multiscale combinatorial grouping*, 2017. At least `mask_iou`, for slots may serve twice.
    """
    iou = overlaps(truth, masks)
    return _mean(iou.max(-1), ~np.isnan(iou[..., 0]))


def assignment(cost: Array) -> tuple[Array, Array]:
    """Rows and columns, each used once, of the least total cost: (R, C) to min(R, C) pairs, by row.

    Shortest augmenting paths on reduced costs, O(R² C).

    >>> rows, columns = assignment(np.array([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0]]))
    >>> rows.tolist(), columns.tolist()
    ([0, 1], [1, 0])
    """
    cost = np.asarray(cost, np.float64)
    if cost.shape[0] > cost.shape[1]:
        columns, rows = assignment(cost.T)
        by_row = np.argsort(rows)
        return rows[by_row], columns[by_row]
    R, C = cost.shape
    row_price, column_price = np.zeros(R), np.zeros(C)
    owner = np.full(C, -1)  # the row that has a column
    for row in range(R):
        # Dijkstra from this row to a free column; `came` is the column before each on the path.
        distance, came, done = np.full(C, np.inf), np.full(C, -1), np.zeros(C, bool)
        at, column, length = row, -1, 0.0
        while True:
            through = length + cost[at] - row_price[at] - column_price
            nearer = ~done & (through < distance)
            distance[nearer], came[nearer] = through[nearer], column
            column = int(np.where(done, np.inf, distance).argmin())
            length, done[column] = distance[column], True
            if owner[column] < 0:
                break
            at = owner[column]
        saved = length - distance[done]
        column_price[done] -= saved
        row_price[row] += length
        taken = done & (owner >= 0)
        row_price[owner[taken]] += length - distance[taken]
        while column >= 0:
            before = came[column]
            owner[column] = row if before < 0 else owner[before]
            column = before
    columns = np.empty(R, int)
    columns[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
    return np.arange(R), columns


def slot_usage(masks: Any) -> Array:
    """The share of the picture that each slot wins: (..., K), which sums to 1."""
    masks = _masks(masks)
    winner = segments(masks)[..., None, :, :] == np.arange(masks.shape[-3])[:, None, None]
    return winner.mean((-2, -1))


def used_slots(masks: Any, least: float = LEAST) -> Array:
    """How many slots win at least that share of the picture: integers (...)."""
    return (slot_usage(masks) >= least).sum(-1)


def collapsed(masks: Any, least: float = LEAST) -> Array:
    """Whether a single slot explains the picture, no other being used: bool (...)."""
    return used_slots(masks, least) <= 1


def over_segmentation(truth: Any, masks: Any, part: float = PART) -> Array:
    """The share of visible objects that are split: two slots or more hold at least `part` of their pixels each."""
    table = contingency(truth, masks)[..., 1:, :]
    size = table.sum(-1, keepdims=True)
    return _mean((table >= part * np.maximum(size, 1)).sum(-1) > 1, size[..., 0] > 0)


def identity_switches(truth: Any, masks: Any, least: int = 1) -> Array:
    """How often an object passes to another slot: (T, ..., H, W) and (T, ..., K, H, W) to rates (...).

    Of all steps in time at which an object is visible before and after (at least `least` pixels), the share after
    which another slot holds most of it. The identity switches of CLEAR MOT (Bernardin and Stiefelhagen, *Evaluating
    multiple object tracking performance*, 2008), as a rate.
    """
    table = contingency(truth, masks)[..., 1:, :]  # (T, ..., O - 1, K)
    visible, holder = table.sum(-1) >= least, table.argmax(-1)
    both = visible[1:] & visible[:-1]
    switched = (holder[1:] != holder[:-1]) & both
    steps = both.sum((0, -1))
    return np.divide(switched.sum((0, -1)), steps, out=np.full(steps.shape, np.nan), where=steps > 0)


def summary(masks: Any, truth: Any | None = None) -> dict[str, float]:
    """All scores of sequences in one dict, means over time and sequences.

    Args:
        masks: (T, B, K, H, W).
        truth: (T, B, H, W), or None: only what needs no true masks.

    Returns:
        "slots used" and "collapsed"; with `truth` also "FG-ARI", "ARI", "mask IoU", "mean best overlap",
        "objects split" and "identity switches", NaN where nothing could be scored.
    """
    scores = {"slots used": used_slots(masks).mean(), "collapsed": collapsed(masks).mean()}
    if truth is not None:
        scores = {
            "FG-ARI": _nanmean(foreground_ari(truth, masks)),
            "ARI": _nanmean(adjusted_rand_index(truth, masks)),
            "mask IoU": _nanmean(mask_iou(truth, masks)),
            "mean best overlap": _nanmean(mean_best_overlap(truth, masks)),
            "objects split": _nanmean(over_segmentation(truth, masks)),
            "identity switches": _nanmean(identity_switches(truth, masks)),
            **scores,
        }
    return {name: float(score) for name, score in scores.items()}


def _array(value: Any) -> Array:
    if not hasattr(value, "detach"):
        return np.asarray(value)
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).numpy()  # NumPy has no bfloat16


def _masks(masks: Any) -> Array:
    masks = _array(masks)
    if masks.ndim < 3 or 0 in masks.shape[-3:]:
        raise ValueError(f"masks: expected (..., K, H, W), got {masks.shape}")
    return masks


def _mean(values: Array, where: Array) -> Array:
    """Mean over the last axis of some values, NaN where there are none."""
    count = where.sum(-1)
    total = np.where(where, values, 0).sum(-1, dtype=np.float64)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def _nanmean(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
