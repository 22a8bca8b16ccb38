"""The observe scan for CUDA devices: its phases (kernels/rssm_phases.py) in three shapes of launch.

- tile: one program per tile of sequences walks all steps and all features. Nobody to wait for: small models.
- persistent: programs share the features of a tile of sequences, walk all steps and meet between phases by a counter in
  global memory. A cooperative launch makes sure that all of them run at once.
- split: a launch per phase and step, worth capturing in a CUDA graph. For many tiles of sequences, whose products hide
  the launches.

A shape is the same kernel with other constants, so what the interpreter can run (it cannot run programs side by side)
checks all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from phyxdream.kernels import rssm_phases as phases
from phyxdream.kernels.rssm_phases import (
    ALL,
    BLOCK_GRU,
    GRU,
    LAYER_NORM_GRU,
    Gradients,
    Layer,
    Layers,
    Memory,
    Sizes,
    Weights,
    meet,
)

if TYPE_CHECKING:
    from phyxdream.ops.rssm_observe_triton import Model


class Tiles(NamedTuple):
    """How many tiles of features a phase has."""

    inputs: tl.constexpr
    second: tl.constexpr  # the gates of layernorm_gru, the mix of block_gru
    deter: tl.constexpr
    head: tl.constexpr
    sample: tl.constexpr


@triton.jit(do_not_specialize=["T", "B", "first", "last"])
def forward_kernel(w, l, d, s, n, arrivals, T, B, first, last, PHASE: tl.constexpr, GRID: tl.constexpr):
    """Steps [first, last); all phases, or the one of that number."""
    p, programs, tile = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    met = 0
    for t in tl.range(first, last, num_stages=1):
        if PHASE == ALL or PHASE == 0:
            for i in tl.range(p, n.inputs, programs, num_stages=1):
                phases.inputs(w, l, d, s, t, tile, B, i)
            met = meet(arrivals, met, PHASE, GRID)
        if n.second > 0 and (PHASE == ALL or PHASE == 1):
            for i in tl.range(p, n.second, programs, num_stages=1):
                if s.cell == BLOCK_GRU:
                    phases.mix(w, l, d, s, t, tile, B, i)
                else:
                    phases.gates(w, l, d, s, t, tile, B, i)
            met = meet(arrivals, met, PHASE, GRID)
        if PHASE == ALL or PHASE == 2:
            for i in tl.range(p, n.deter, programs, num_stages=1):
                phases.update(w, l, d, s, t, T, tile, B, i)
            met = meet(arrivals, met, PHASE, GRID)
        if PHASE == ALL or PHASE == 3:
            for i in tl.range(p, n.head, programs, num_stages=1):
                phases.head(w.head, s.head_row, l.head, d, s, t, tile, B, i)
            met = meet(arrivals, met, PHASE, GRID)
        if PHASE == ALL or PHASE == 4:
            for i in tl.range(p, n.sample, programs, num_stages=1):
                phases.sample(w, l, d, s, t, T, tile, B, i)
            met = meet(arrivals, met, PHASE, GRID)


@triton.jit(do_not_specialize=["T", "B", "first", "last"])
def backward_kernel(w, l, d, s, n, arrivals, T, B, first, last, PHASE: tl.constexpr, GRID: tl.constexpr):
    """Steps [first, last), the last one first."""
    p, programs, tile = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    met = 0
    for back in tl.range(last - first, num_stages=1):
        t = last - 1 - back
        if PHASE == ALL or PHASE == 0:
            for i in tl.range(p, n.sample, programs, num_stages=1):
                phases.statistics_back(w, l, d, s, t, T, tile, B, i)
            met = meet(arrivals, met, PHASE, GRID)
        if PHASE == ALL or PHASE == 1:
            for i in tl.range(p, n.head, programs, num_stages=1):
                phases.head_back(w, l, d, s, t, tile, B, i)
            met = meet(arrivals, met, PHASE, GRID)
        if PHASE == ALL or PHASE == 2:
            for i in tl.range(p, n.deter, programs, num_stages=1):
                phases.update_back(w, l, d, s, t, tile, B, i)
            met = meet(arrivals, met, PHASE, GRID)
        if s.cell == BLOCK_GRU and (PHASE == ALL or PHASE == 3):
            for i in tl.range(p, n.second, programs, num_stages=1):
                phases.mix_back(w, l, d, s, t, tile, B, i)
            met = meet(arrivals, met, PHASE, GRID)
        if PHASE == ALL or PHASE == 4:
            for i in tl.range(p, n.inputs + n.deter, programs, num_stages=1):
                if i < n.inputs:
                    phases.inputs_back(w, l, d, s, t, tile, B, i)
                else:
                    phases.carry_back(w, l, d, s, t, tile, B, i - n.inputs)
            met = meet(arrivals, met, PHASE, GRID)
        if s.cell == BLOCK_GRU and (PHASE == ALL or PHASE == 5):  # the next phase reads nothing of it: no meeting
            for i in tl.range(p, n.deter, programs, num_stages=1):
                phases.deter_back(w, l, d, s, t, tile, B, i)


# ---------------------------------------------------------------------------------------------------------------------
# Which shape.


@dataclass(frozen=True)
class Plan:
    """What is launched: `programs` share the features of each of `tiles` tiles of `rows` sequences."""

    shape: str
    programs: int
    tiles: int
    rows: int
    columns: int
    depth: int
    warps: int

    @property
    def options(self) -> dict[str, int]:
        """Of the launch. Left to itself, the assembler spills a few words for the sake of more programs at once."""
        return dict(num_warps=self.warps, num_stages=2 if self.shape == "tile" else 3, maxnreg=255)

    def __str__(self) -> str:
        programs = f"{self.programs} program{'s' * (self.programs > 1)} of {self.columns} features"
        return f"Triton, {self.shape} scan: {programs} for each of {self.tiles} tiles of {self.rows} sequences"


SMALL = 256  # D up to which one program streams all weights sooner than several have met
FEW = 4  # tiles of sequences up to which a step is waiting rather than products


def choose_shape(model: Model, processors: int) -> str:
    """Of the launch, where `processors` programs can run at once; 0 where programs cannot wait for each other."""
    if model.D <= SMALL:
        return "tile"
    tiles = triton.cdiv(model.B, 16)
    return "persistent" if tiles <= min(FEW, processors // 16) else "split"


def plan(model: Model, half: bool, processors: int) -> Plan:
    shape = choose_shape(model, processors)
    if shape == "split":
        rows, columns = min(64 if half else 16, max(16, triton.next_power_of_2(model.B))), 32
    else:
        rows, columns = 16, 16 if shape == "persistent" and model.D <= 1024 else 32
    # fp32 products run on the plain units, whose operands all lie in registers.
    depth = (64 if rows == 16 and columns == 32 else 32) if half else 16
    tiles = triton.cdiv(model.B, rows)
    counts = counted(model, columns)
    heads = (triton.cdiv(size, columns) for name, (_, size) in model.layers.items() if name not in Layers._fields)
    most = max(*counts[1:], counts[0] + counts[2], *heads)
    programs = {"tile": 1, "persistent": min(most, max(1, processors // tiles)), "split": most}[shape]
    return Plan(shape, programs, tiles, rows, columns, depth, warps=4 if shape == "split" and rows == 16 else 8)


def counted(model: Model, columns: int) -> tuple[int, ...]:
    """The fields of `Tiles`."""
    of_layer = triton.cdiv(model.U, columns)
    deter = triton.cdiv(model.D // model.blocks, columns) * model.blocks
    second = {"gru": 0, "layernorm_gru": triton.cdiv(3 * model.D, columns), "block_gru": deter}[model.cell]
    sampled = _lanes(model, columns)[1] if model.classes else columns
    inputs = of_layer * (2 + (model.A > 0) if model.cell == "block_gru" else 1)
    return inputs, second, deter, triton.cdiv(model.V, columns), triton.cdiv(model.stoch, sampled)


def _lanes(model, columns):
    """Of a tile that samples: lanes for the classes, and variables."""
    classes = triton.next_power_of_2(max(model.classes, 1))
    return classes, max(1, columns // classes)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments of the kernels. Their leaves may be tensors or, to compile ahead of time, Triton's names of types.


def layers_of(model: Model, plan: Plan, weights: dict[str, Any]) -> dict[str, Layer]:
    """By their names in `model.layers`."""
    acts = {"silu": phases.SILU, "elu": phases.ELU, "relu": phases.RELU}
    sums, layers = 0, {}
    for name, (start, size) in model.layers.items():
        bias, gain, shift = (weights[f"{name}_{part}"] for part in ("bias", "gain", "shift"))
        layers[name] = Layer(
            bias, gain, shift, *map(tl.constexpr, (
                size,
                model.blocks if name == "mix" else 1,
                model.options.rms_eps if shift is None else model.options.layer_eps,
            )),
            phases.IDENTITY if name == "gates" else acts[model.act(name)],
            *map(tl.constexpr, (start, sums)),
        )  # fmt: skip
        sums += 2 * _layer_tiles(model, name, size, plan.columns)
    return layers


def arguments(model: Model, plan: Plan, weights: dict[str, Any], memory: Memory | Gradients) -> tuple:
    """The weights, layers, memory, sizes and tiles that all kernels start with."""
    layers = layers_of(model, plan, weights)
    classes, variables = _lanes(model, plan.columns)
    cells = {"gru": GRU, "layernorm_gru": LAYER_NORM_GRU, "block_gru": BLOCK_GRU}
    sizes = Sizes(
        cells[model.cell],
        *map(tl.constexpr, (
            model.A, model.D, model.U, model.V, model.stoch, model.classes, model.blocks, model.D + model.E,
            model.tape_row, model.taped, model.gates, model.options.unimix, model.options.min_std, "ieee", plan.rows,
            plan.columns, plan.depth, classes, variables,
            min(triton.next_power_of_2(model.stoch), max(1, 4096 // (plan.rows * plan.columns))),
        )),
    )  # fmt: skip
    matrices = Weights(*(weights[name] for name in Weights._fields))
    counts = Tiles(*map(tl.constexpr, counted(model, plan.columns)))
    return matrices, Layers(*map(layers.get, Layers._fields)), memory, sizes, counts


def _layer_tiles(model, name, size, columns):
    blocks = model.blocks if name == "mix" else 1
    return triton.cdiv(size // blocks, columns) * blocks


def sums_rows(model: Model, plan: Plan) -> int:
    """Rows (B,) of `sums`."""
    return sum(2 * _layer_tiles(model, name, size, plan.columns) for name, (_, size) in model.layers.items())


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def run(model: Model, weights: dict[str, Any], memory: Memory | Gradients) -> None:
    """All steps, forward or backward by the kind of memory; fills `memory.sums` and what its fields say."""
    tape = memory.tape
    p = plan(model, weights["out"].element_size() == 2, processors(tape.device))
    memory = memory._replace(sums=tape.new_empty(sums_rows(model, p), model.B))
    backward = isinstance(memory, Gradients)
    kernel = backward_kernel if backward else forward_kernel
    given = arguments(model, p, weights, memory)
    arrivals = torch.zeros(p.tiles, dtype=torch.int32, device=tape.device)
    options: dict[str, Any] = p.options
    if p.shape == "persistent" and tape.is_cuda:
        options["launch_cooperative_grid"] = True
    with torch.cuda.device_of(tape):
        if p.shape != "split":
            grid, waits = (p.programs, p.tiles), p.shape == "persistent"
            kernel[grid](*given, arrivals, model.T, model.B, 0, model.T, PHASE=ALL.value, GRID=waits, **options)
            return
        launches = launched(model, given[-1], backward)
        for t in reversed(range(model.T)) if backward else range(model.T):
            for phase, programs in launches:
                kernel[programs, p.tiles](
                    *given, arrivals, model.T, model.B, t, t + 1, PHASE=phase, GRID=False, **options
                )


def launched(model: Model, tiles: Tiles, backward: bool) -> list[tuple[int, int]]:
    """The phases of a step in the split shape, with their programs."""
    inputs, second, deter, head, sample = (count.value for count in tiles)
    if not backward:
        return [(i, n) for i, n in enumerate((inputs, second, deter, head, sample)) if n]
    found = [(0, sample), (1, head), (2, deter), (4, inputs + deter)]
    return [*found[:3], (3, second), found[3], (5, deter)] if model.cell == "block_gru" else found
