"""The scans of an RSSM for CUDA devices: their phases (kernels/rssm_phases.py) in three shapes of launch.

One pair of kernels serves them all. Observation is imagination whose prior is the posterior, with what the embedding
brings and with resets; imagination may have a policy that acts before each step, or given actions, which come in
through a layer of all steps at once like those of an observation.

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
    BOUNDED_NORMAL,
    CATEGORICAL,
    GRU,
    LAYER_NORM_GRU,
    TANH_NORMAL,
    Gradients,
    Head,
    Layer,
    Layers,
    Memory,
    Sizes,
    Weights,
    meet,
)

if TYPE_CHECKING:
    from phyxdream.ops.rssm_imagine_cpu import PolicyOptions
    from phyxdream.ops.rssm_triton import Model


class Tiles(NamedTuple):
    """How many tiles of features a phase has, or each layer of a head, and how many layers there are."""

    inputs: tl.constexpr
    second: tl.constexpr  # the gates of layernorm_gru, the mix of block_gru
    deter: tl.constexpr
    sample: tl.constexpr
    prior: Any
    policy: Any
    priors: tl.constexpr
    policies: tl.constexpr


@triton.jit(do_not_specialize=["T", "B", "first", "last"])
def forward_kernel(
    w, l, prior, policy, d, s, n, arrivals, T, B, first, last, PHASE: tl.constexpr, LAYER: tl.constexpr,
    GRID: tl.constexpr,
):  # fmt: skip
    """Steps [first, last); all phases, or the one of that number, and of that layer of a head."""
    p, programs, tile = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    met = 0
    for t in tl.range(first, last, num_stages=1):
        for k in tl.static_range(n.policies):
            if PHASE == ALL or (PHASE == 0 and k == LAYER):
                for i in tl.range(p, n.policy[k], programs, num_stages=1):
                    if k == 0:
                        phases.policy_layer(policy, policy.layers[0], d, s, t, tile, B, i)
                    else:
                        phases.next_layer(
                            policy.weights[k], policy.layers[k], policy.layers[k - 1], d, s, t, tile, B, i
                        )
                met = meet(arrivals, met, PHASE, GRID)
        if n.policies > 0 and (PHASE == ALL or PHASE == 1):
            if p == 0:
                phases.draw(policy, policy.layers[n.policies - 1], d, s, t, tile, B)
            met = meet(arrivals, met, PHASE, GRID)
        if PHASE == ALL or PHASE == 2:
            for i in tl.range(p, n.inputs, programs, num_stages=1):
                phases.inputs(w, l, d, s, t, tile, B, i)
            met = meet(arrivals, met, PHASE, GRID)
        if n.second > 0 and (PHASE == ALL or PHASE == 3):
            for i in tl.range(p, n.second, programs, num_stages=1):
                if s.cell == BLOCK_GRU:
                    phases.mix(w, l, d, s, t, tile, B, i)
                else:
                    phases.gates(w, l, d, s, t, tile, B, i)
            met = meet(arrivals, met, PHASE, GRID)
        if PHASE == ALL or PHASE == 4:
            for i in tl.range(p, n.deter, programs, num_stages=1):
                phases.update(w, l, d, s, t, T, tile, B, i)
            met = meet(arrivals, met, PHASE, GRID)
        for k in tl.static_range(n.priors):
            if PHASE == ALL or (PHASE == 5 and k == LAYER):
                for i in tl.range(p, n.prior[k], programs, num_stages=1):
                    if k == 0:
                        phases.prior_layer(prior.weights[0], s.head_row, prior.layers[0], d, s, t, tile, B, i)
                    else:
                        phases.next_layer(prior.weights[k], prior.layers[k], prior.layers[k - 1], d, s, t, tile, B, i)
                met = meet(arrivals, met, PHASE, GRID)
        if PHASE == ALL or PHASE == 6:
            for i in tl.range(p, n.sample, programs, num_stages=1):
                phases.sample(w, l, d, s, t, T, tile, B, i)
            met = meet(arrivals, met, PHASE, GRID)


@triton.jit(do_not_specialize=["T", "B", "first", "last"])
def backward_kernel(
    w, l, prior, policy, d, s, n, arrivals, T, B, first, last, PHASE: tl.constexpr, LAYER: tl.constexpr,
    GRID: tl.constexpr,
):  # fmt: skip
    """Steps [first, last), the last one first."""
    p, programs, tile = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    met = 0
    for back in tl.range(last - first, num_stages=1):
        t = last - 1 - back
        if PHASE == ALL or PHASE == 0:
            for i in tl.range(p, n.sample, programs, num_stages=1):
                phases.statistics_back(w, l, d, s, policy, t, T, tile, B, i)
            met = meet(arrivals, met, PHASE, GRID)
        for k in tl.static_range(n.priors - 1, -1, -1):
            if PHASE == ALL or (PHASE == 1 and k == LAYER):
                for i in tl.range(p, n.prior[k], programs, num_stages=1):
                    if k == n.priors - 1:
                        phases.last_layer_back(
                            w.out, s.stoch * (s.classes if s.classes > 0 else 2), d.statistics_rows, prior.layers[k],
                            d.prior_rows[k], d, s, t, tile, B, i,
                        )  # fmt: skip
                    else:
                        phases.layer_back(
                            prior.weights[k + 1], prior.layers[k + 1], d.prior_rows[k + 1], prior.layers[k],
                            d.prior_rows[k], d, s, t, tile, B, i,
                        )  # fmt: skip
                met = meet(arrivals, met, PHASE, GRID)
        if PHASE == ALL or PHASE == 2:
            for i in tl.range(p, n.deter, programs, num_stages=1):
                phases.update_back(w, l, d, s, prior, policy, t, T, tile, B, i)
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
        if n.policies > 0 and (PHASE == ALL or PHASE == 6):
            if p == 0:
                phases.draw_back(policy, policy.layers[n.policies - 1], w, l, d, s, t, tile, B)
            met = meet(arrivals, met, PHASE, GRID)
        for k in tl.static_range(n.policies - 1, -1, -1):
            if PHASE == ALL or (PHASE == 7 and k == LAYER):
                for i in tl.range(p, n.policy[k], programs, num_stages=1):
                    if k == n.policies - 1:
                        phases.last_layer_back(
                            policy.out, s.A if policy.dist == CATEGORICAL else 2 * s.A, d.action_rows, policy.layers[k],
                            d.policy_rows[k], d, s, t, tile, B, i,
                        )  # fmt: skip
                    else:
                        phases.layer_back(
                            policy.weights[k + 1], policy.layers[k + 1], d.policy_rows[k + 1], policy.layers[k],
                            d.policy_rows[k], d, s, t, tile, B, i,
                        )  # fmt: skip
                met = meet(arrivals, met, PHASE, GRID)


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
    most = max(*counts[1:4], counts[0] + counts[2], *counts[4], *counts[5])
    programs = {"tile": 1, "persistent": min(most, max(1, processors // tiles)), "split": most}[shape]
    return Plan(shape, programs, tiles, rows, columns, depth, warps=4 if shape == "split" and rows == 16 else 8)


def counted(model: Model, columns: int) -> tuple:
    """The first fields of `Tiles`."""
    of_layer = triton.cdiv(model.U, columns)
    deter = triton.cdiv(model.D // model.blocks, columns) * model.blocks
    second = {"gru": 0, "layernorm_gru": triton.cdiv(3 * model.D, columns), "block_gru": deter}[model.cell]
    sampled = _lanes(model, columns)[1] if model.classes else columns
    inputs = of_layer * (2 + (model.A > 0) if model.cell == "block_gru" else 1)
    heads = ([triton.cdiv(model.layers[name][1], columns) for name in names] for names in (model.prior, model.policy))
    return inputs, second, deter, triton.cdiv(model.stoch, sampled), *heads


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


def arguments(
    model: Model, plan: Plan, weights: dict[str, Any], prior: Head, policy: Head | None, memory: Memory | Gradients
) -> tuple:
    """The weights, layers, heads, memory, sizes and tiles that both kernels start with."""
    layers = layers_of(model, plan, weights)
    classes, variables = _lanes(model, plan.columns)
    cells = {"gru": GRU, "layernorm_gru": LAYER_NORM_GRU, "block_gru": BLOCK_GRU}
    sizes = Sizes(
        cells[model.cell],
        *map(tl.constexpr, (
            model.A, model.D, model.U, model.stoch, model.classes, model.blocks, model.D + model.E, model.in_row,
            model.tape_row, model.taped, model.gates, model.options.unimix, model.options.min_std,
            model.options.cumulative, "ieee", plan.rows,
            plan.columns, plan.depth, classes, variables,
            min(triton.next_power_of_2(model.stoch), max(1, 4096 // (plan.rows * plan.columns))),
        )),
    )  # fmt: skip
    matrices = Weights(*(weights[name] for name in Weights._fields))
    prior = prior._replace(layers=tuple(layers[name] for name in model.prior))
    if policy is not None:
        policy = policy._replace(layers=tuple(layers[name] for name in model.policy))
    *counts, priors, policies = counted(model, plan.columns)
    heads = (tuple(map(tl.constexpr, counts)) for counts in (priors, policies))
    tiles = Tiles(*map(tl.constexpr, counts), *heads, tl.constexpr(len(priors)), tl.constexpr(len(policies)))
    return matrices, Layers(*map(layers.get, Layers._fields)), prior, policy, memory, sizes, tiles


def policy_constants(options: PolicyOptions, actions: int) -> dict[str, tl.constexpr]:
    """The fields of a policy's `Head` that are numbers."""
    dists = {"categorical": CATEGORICAL, "bounded_normal": BOUNDED_NORMAL, "tanh_normal": TANH_NORMAL}
    numbers = dict(unimix=options.unimix, min_std=options.min_std, max_std=options.max_std)
    lanes = max(16, triton.next_power_of_2(actions))
    return {
        "dist": dists[options.dist],
        **{k: tl.constexpr(x) for k, x in numbers.items()},
        "detach": tl.constexpr(options.detach_feature),
        "clip": tl.constexpr(options.clip_action),
        "LANES": tl.constexpr(lanes),
    }


def _layer_tiles(model, name, size, columns):
    blocks = model.blocks if name == "mix" else 1
    return triton.cdiv(size // blocks, columns) * blocks


def sums_rows(model: Model, plan: Plan) -> int:
    """Rows (B,) of `sums`."""
    return sum(2 * _layer_tiles(model, name, size, plan.columns) for name, (_, size) in model.layers.items())


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def run(model: Model, weights: dict[str, Any], prior: Head, policy: Head | None, memory: Memory | Gradients) -> None:
    """All steps, forward or backward by the kind of memory; fills what its fields and the policy's say. The `layers` of
    the heads, and `memory.sums`, are made here."""
    tape = memory.tape
    p = plan(model, weights["out"].element_size() == 2, processors(tape.device))
    memory = memory._replace(sums=tape.new_empty(sums_rows(model, p), model.B))
    backward = isinstance(memory, Gradients)
    kernel = backward_kernel if backward else forward_kernel
    given = arguments(model, p, weights, prior, policy, memory)
    arrivals = torch.zeros(p.tiles, dtype=torch.int32, device=tape.device)
    options: dict[str, Any] = p.options
    if p.shape == "persistent" and tape.is_cuda:
        options["launch_cooperative_grid"] = True
    with torch.cuda.device_of(tape):
        if p.shape != "split":
            grid, waits = (p.programs, p.tiles), p.shape == "persistent"
            kernel[grid](
                *given, arrivals, model.T, model.B, 0, model.T, PHASE=ALL.value, LAYER=0, GRID=waits, **options
            )
            return
        launches = launched(model, given[-1], backward)
        for t in reversed(range(model.T)) if backward else range(model.T):
            for phase, layer, programs in launches:
                kernel[programs, p.tiles](
                    *given, arrivals, model.T, model.B, t, t + 1, PHASE=phase, LAYER=layer, GRID=False, **options
                )


def launched(model: Model, n: Tiles, backward: bool) -> list[tuple[int, int, int]]:
    """The phases of a step in the split shape, with the layer of a head, and with their programs."""
    prior, policy = ([(k, count.value) for k, count in enumerate(counts)] for counts in (n.prior, n.policy))
    inputs, second, deter, sample = (count.value for count in n[:4])
    block, draws = model.cell == "block_gru", int(bool(policy))
    if backward:
        found = [(0, 0, sample), *((1, *layer) for layer in reversed(prior)), (2, 0, deter), (3, 0, second * block)]
        found += [(4, 0, inputs + deter), (5, 0, deter * block), (6, 0, draws)]
        found += [(7, *layer) for layer in reversed(policy)]
    else:
        found = [*((0, *layer) for layer in policy), (1, 0, draws), (2, 0, inputs), (3, 0, second), (4, 0, deter)]
        found += [*((5, *layer) for layer in prior), (6, 0, sample)]
    return [launch for launch in found if launch[2]]
