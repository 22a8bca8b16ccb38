"""The report's panels on slots: what each paints and attends to over time, and whether it is an object.

`slot_panels(agent)` plays a few episodes that the agent never learned from, has its world model explain them, and
draws. It needs no more of a world model than a method

    explain_slots(batch, context=None, generator=None)

that takes observations (T, B, *shape), action (T, B, A) and is_first (T, B), filters the first `context` steps (None:
all), imagines the others from the actions alone, and returns an object with the attributes of `SlotView`, as tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from phyxdream.agents import DreamerAgent
from phyxdream.errors import EnvError, MissingDependency
from phyxdream.nn.vision import as_float_image
from phyxdream.train import slot_metrics
from phyxdream.train.open_loop import CONTEXT, SEED, play
from phyxdream.train.report import (
    IMAGINED,
    INK,
    LEGEND,
    PAGE_WIDTH,
    SEEN,
    Panel,
    cell,
    dress,
    font,
    spread,
    upscaling,
)

Array = NDArray[Any]

LENGTH, SEQUENCES = 40, 4
# Of slots and objects, in their order: matplotlib's "tab20", the strong ones first.
_COLOURS = [
    tuple(round(255 * c) for c in matplotlib.colormaps["tab20"](i)[:3]) for i in (*range(0, 20, 2), *range(1, 20, 2))
]
_GREY = (203, 213, 225)


@dataclass
class SlotView:
    """What slots do in sequences of pictures.

    Attributes:
        pictures: (T, B, K, C, H, W) in [0, 1], what each slot paints. C of at least 3: the first three are shown.
        masks: (T, B, K, H, W), where; they sum to 1 over slots. The model's picture is Σ_k masks_k · pictures_k.
        attention: (S, B, K, h, w), which tokens of the encoder each slot attends to, of the S <= T steps whose
            pictures the model saw; None if it has no such thing.
    """

    pictures: Array
    masks: Array
    attention: Array | None = None

    @classmethod
    def of(cls, found: Any) -> SlotView:
        """The same in NumPy, checked.

        Raises:
            ValueError: if the shapes do not fit, naming the attribute.
        """
        pictures, masks = _array(found.pictures), _array(found.masks)
        attention = None if found.attention is None else _array(found.attention)
        if pictures.ndim != 6 or not pictures.size:
            raise ValueError(f"pictures: expected (T, B, K, C, H, W), got {pictures.shape}")
        expected = (*pictures.shape[:3], *pictures.shape[4:])
        if masks.shape != expected:
            raise ValueError(f"masks: expected (T, B, K, H, W) = {expected}, got {masks.shape}")
        if attention is not None and (
            attention.ndim != 5 or attention.shape[1:3] != pictures.shape[1:3] or len(attention) > len(pictures)
        ):
            raise ValueError(f"attention: expected (S, B, K, h, w), S at most T = {len(pictures)}, and B, K = "
                             f"{pictures.shape[1:3]}, got {attention.shape}")  # fmt: skip
        return cls(_rgb(pictures), masks, attention)

    @property
    def model(self) -> Array:
        """(T, B, 3, H, W): the pictures of all slots, mixed."""
        return np.einsum("tbkhw,tbkchw->tbchw", self.masks, self.pictures)


def slot_panels(agent: DreamerAgent, seed: int = SEED) -> list[Panel]:
    """Panels on the slots of an agent's world model; none if it has no slots.

    Episodes come from new environments with `seed`, played by the agent's own policy without exploration. Where
    `envs.make(..., segmentation=True)` knows the true objects, slots are scored against them.
    """
    model = agent.model.world_model
    if not hasattr(model, "explain_slots"):
        return []
    try:
        batch, truth = play(agent, SEQUENCES, LENGTH, seed, segmentation=True)
    except (EnvError, MissingDependency) as error:
        return [Panel("Slots", f"There are no episodes to show slots in: {error}")]
    first = next(name for name, shape in agent.shapes.items() if len(shape) == 3)
    picture = _rgb(as_float_image(batch[first]).numpy())
    inputs = {name: value.to(agent.device) for name, value in batch.items()}
    inputs["action"] = agent.encode_action(inputs["action"])
    context = min(CONTEXT, len(picture) // 2)

    def explain(context: int | None) -> SlotView:
        return SlotView.of(model.explain_slots(inputs, context, torch.Generator(agent.device).manual_seed(SEED)))

    filtered, open_loop = explain(None), explain(context)
    return panels(picture, filtered, open_loop, context, truth)


def panels(
    picture: Array, filtered: SlotView, open_loop: SlotView | None = None, context: int = 0, truth: Array | None = None
) -> list[Panel]:
    """The panels of the report, of the first sequence; scores are of all.

    Args:
        picture: (T, B, 3, H, W) in [0, 1], what the model was shown.
        filtered: slots of a model that saw every picture.
        open_loop: those of one that saw the first `context` alone.
        context: see there.
        truth: (T, B, H, W) integers, the true objects, or None.
    """
    frames, sharp = len(picture), float(np.nanmean(sharpness(filtered.model, picture)))
    scores = {**slot_metrics.summary(filtered.masks, truth), "sharpness": sharp}
    note = "Sharpness: gradients of the model's pictures as a share of the true ones'. "
    if truth is not None:
        note += "FG-ARI to mean best overlap: 1 is perfect. Objects split and identity switches: 0 is. "
    out = [
        Panel("Slots: are they objects?", scores, note + "Episodes that the model never learned from."),
        Panel("Slots over time", slot_sheet(picture, filtered, frames, truth),
              "What every slot paints, white where its mask is not."),
    ]  # fmt: skip
    if filtered.attention is not None:
        out.append(
            Panel("Slots: encoder attention beside decoder alpha", attention_sheet(picture, filtered),
                  "In each pair, left: the tokens a slot attends to; right: the pixels it paints. Bright is 1."),
        )  # fmt: skip
    if open_loop is not None:
        caption = (
            f"Blue frames: the model is shown the first {context} pictures; orange: it imagines, given the actions."
        )
        sheet = slot_sheet(picture, open_loop, context, truth)
        out.append(Panel("Slots: open-loop prediction", sheet, caption))
        out.append(Panel("Slots: open loop against filtered", time_figure(picture, filtered, open_loop, context, truth),
                         "Mean squared error of the pictures, and how well slots keep to the true objects."
                         if truth is not None else "Mean squared error of the pictures."))  # fmt: skip
    return out


# Pictures


def sharpness(model: Any, truth: Any) -> Array:
    """Gradient magnitude of pictures (..., C, H, W) as a share of that of the true ones: (...).

    Below 1 is blurred. Gradients are differences of neighbouring pixels, their magnitude is the root of the mean
    square: the plain mean would not tell a sharp edge from the same step over several pixels. NaN where the truth is
    one colour.
    """
    blurred, sharp = (_gradient(_array(picture).astype(np.float64)) for picture in (model, truth))
    return np.divide(blurred, sharp, out=np.full(sharp.shape, np.nan), where=sharp > 0)


def _gradient(picture: Array) -> Array:
    across, down = np.diff(picture, axis=-1)[..., :-1, :], np.diff(picture, axis=-2)[..., :, :-1]
    return np.sqrt((across**2 + down**2).mean((-3, -2, -1)))


def sharpness_sheet(pictures: Mapping[str, Array], truth: Array, columns: int = 8) -> Array:
    """Pictures of several models below the true ones, with their `sharpness`, for comparing losses.

    Args:
        pictures: by name of the model, each (N, 3, H, W) in [0, 1].
        truth: (N, 3, H, W).

    Returns:
        A uint8 image (height, width, 3).
    """
    rows = [_Row("truth", _bytes(truth[:columns]))]
    for name, made in pictures.items():
        rows.append(_Row(f"{name}\n{np.nanmean(sharpness(made, truth)):.2f}", _bytes(made[:columns])))
    return _sheet(rows, [""] * min(columns, len(truth)), [_GREY] * min(columns, len(truth)))


def slot_sheet(picture: Array, view: SlotView, context: int, truth: Array | None = None, sequence: int = 0) -> Array:
    """Input, reconstruction, segments and every slot's share of the picture, over time to the right.

    Args: as for `panels`; frames from `context` on are framed as imagined. Returns a uint8 image (height, width, 3).
    """
    frames, K = view.masks.shape[0], view.masks.shape[2]
    times = _times(frames, context, picture.shape[-1] * upscaling(*picture.shape[-2:]) // 2)
    masks, parts = view.masks[times, sequence], view.pictures[times, sequence]
    rows = [_Row("truth", _bytes(picture[times, sequence])), _Row("model", _bytes(view.model[times, sequence]))]
    if truth is not None:
        rows.append(_Row("objects", _labels(truth[times, sequence])))
    rows.append(_Row("slots", _labels(masks.argmax(1) + 1), gap=True))
    for k in range(K):
        share = masks[:, k, None]
        rows.append(_Row(f"slot {k + 1}", _bytes(parts[:, k] * share + 1 - share), _COLOURS[k % len(_COLOURS)]))
    return _sheet(rows, [str(t + 1) for t in times], [SEEN if t < context else IMAGINED for t in times])


def attention_sheet(picture: Array, view: SlotView, sequence: int = 0, columns: int = 5) -> Array:
    """The encoder's attention of every slot and, right of it, the decoder's mask. A uint8 image (height, width, 3)."""
    height, width = picture.shape[-2:]
    times = spread(0, len(view.attention), columns)  # type: ignore[arg-type]
    rows = [_Row("", _pairs(_bytes(picture[times, sequence]), _bytes(view.model[times, sequence])), gap=True)]
    for k in range(view.masks.shape[2]):
        attention = _enlarged(view.attention[times, sequence, k], height, width)  # type: ignore[index]
        pair = _pairs(_heat(attention), _heat(view.masks[times, sequence, k]))
        rows.append(_Row(f"slot {k + 1}", pair, _COLOURS[k % len(_COLOURS)]))
    return _sheet(rows, [str(t + 1) for t in times], [SEEN] * len(times))


def time_figure(
    picture: Array, filtered: SlotView, open_loop: SlotView, context: int, truth: Array | None = None
) -> Figure:
    """Squared error and, where the true objects are known, FG-ARI, by frame."""
    figure = Figure(figsize=(9.6, 2.6), layout="constrained")
    grid = figure.subplots(1, 1 if truth is None else 2, squeeze=False)[0]
    frozen = picture[max(context - 1, 0)]
    _curves(grid[0], "squared error", context, {
        "filtered": np.square(filtered.model - picture).mean((1, 2, 3, 4)),
        "open loop": np.square(open_loop.model - picture).mean((1, 2, 3, 4)),
        "last picture seen, frozen": np.square(frozen - picture).mean((1, 2, 3, 4)),
    })  # fmt: skip
    grid[0].set_ylim(bottom=0)
    if truth is not None:
        score = {"filtered": filtered, "open loop": open_loop}
        _curves(grid[1], "FG-ARI", context, {name: _mean(slot_metrics.foreground_ari(truth, view.masks))
                                             for name, view in score.items()})  # fmt: skip
        grid[1].set_ylim(top=1.05)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, **LEGEND)
    return figure


def _curves(axes: Axes, label: str, context: int, curves: Mapping[str, Array]) -> None:
    dress(axes)
    styles = (dict(color=INK["accent"]), dict(color=INK["second"]), dict(color=INK["muted"], linestyle="--"))
    for (name, values), style in zip(curves.items(), styles, strict=False):
        first = 0 if name == "filtered" else max(context - 1, 0)
        axes.plot(np.arange(first, len(values)) + 1, values[first:], linewidth=1.6, label=name, **style)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set_xlabel("frame", color=INK["muted"], fontsize=9)
    axes.set_ylabel(label, color=INK["muted"], fontsize=9)


@dataclass
class _Row:
    """A row of a sheet: pictures (N, H, W, 3) uint8, the colour of a mark before its label, and room below it."""

    label: str
    pictures: Array
    colour: tuple[int, ...] | None = None
    gap: bool = False


def _sheet(rows: Sequence[_Row], heads: Sequence[str], frames: Sequence[tuple[int, int, int]]) -> Array:
    height, width = rows[0].pictures.shape[1:3]
    scale = max(1, upscaling(height, width) // 2)
    border, gap, left, top = 2, 4, 74, 20 if any(heads) else 4
    cell_w, cell_h = width * scale + 2 * border, height * scale + 2 * border
    total = sum(cell_h + gap * (3 if row.gap else 1) for row in rows)
    image = Image.new("RGB", (left + len(heads) * (cell_w + gap) + gap, top + total), "white")
    draw, grey = ImageDraw.Draw(image), (71, 85, 105)
    for column, head in enumerate(heads):
        draw.text((left + gap + column * (cell_w + gap) + cell_w / 2, top / 2), head, grey, font(12), anchor="mm")
    y = top
    for row in rows:
        middle = y + cell_h / 2
        draw.multiline_text((left - 4, middle), row.label, grey, font(12), anchor="rm", align="right")
        if row.colour:
            draw.rectangle((4, middle - 5, 14, middle + 5), fill=row.colour)
        for column, (picture, frame) in enumerate(zip(row.pictures, frames, strict=True)):
            image.paste(cell(picture, scale, frame, border), (left + gap + column * (cell_w + gap), int(y)))
        y += cell_h + gap * (3 if row.gap else 1)
    return np.asarray(image)


def _times(frames: int, context: int, width: int) -> list[int]:
    """Which frames a sheet has room for: a third of them seen, where some are imagined."""
    room = int(np.clip((PAGE_WIDTH - 80) // (width + 8), 4, 14))
    if context >= frames:
        return spread(0, frames, room)
    return [*spread(0, context, room // 3), *spread(context, frames, room - room // 3)]


def _labels(labels: Array) -> Array:
    """(N, H, W) integers to colours (N, H, W, 3) uint8; 0 is dark."""
    palette = np.array([(30, 41, 59), *_COLOURS], np.uint8)
    return palette[np.where(labels == 0, 0, (labels - 1) % len(_COLOURS) + 1)]


def _heat(values: Array) -> Array:
    return (matplotlib.colormaps["magma"](values.clip(0, 1))[..., :3] * 255).astype(np.uint8)


def _enlarged(values: Array, height: int, width: int) -> Array:
    """(N, h, w) to (N, height, width) by the nearest."""
    row, column = ((np.arange(new) * old) // new for old, new in zip(values.shape[1:], (height, width), strict=True))
    return values[:, row[:, None], column]


def _pairs(left: Array, right: Array) -> Array:
    """Two rows of pictures (N, H, W, 3) as one of pairs, with a line between."""
    line = np.full((*left.shape[:2], 1, 3), 255, np.uint8)
    return np.concatenate([left, line, right], 2)


def _bytes(picture: Array) -> Array:
    """(N, 3, H, W) in [0, 1] to (N, H, W, 3) uint8."""
    return np.rint(np.moveaxis(picture, 1, -1).clip(0, 1) * 255).astype(np.uint8)


def _rgb(pictures: Array) -> Array:
    """Channels (..., C, H, W) to three: the first three, or the first one thrice."""
    C = pictures.shape[-3]
    return pictures[..., :3, :, :] if C >= 3 else pictures[..., [0, 0, 0], :, :]


def _mean(values: Array) -> Array:
    """Mean of (T, B) over sequences, passing over NaN."""
    known = ~np.isnan(values)
    count = known.sum(1)
    return np.divide(np.where(known, values, 0).sum(1), count, out=np.full(len(values), np.nan), where=count > 0)


def _array(value: Any) -> Array:
    return np.asarray(value.detach().float().cpu() if hasattr(value, "detach") else value)
