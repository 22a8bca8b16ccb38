"""The imagine scan for CUDA devices, without gradient: the phases of the observe scan (kernels/rssm_phases.py) in its
shapes of launch (kernels/rssm_observe.py), with a prior of any number of layers, and with a policy or given actions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from phyxdream.kernels import rssm_observe, rssm_phases
from phyxdream.kernels.rssm_observe import Plan, Tiles, plan, processors, sums_rows
from phyxdream.kernels.rssm_phases import (
    ALL,
    BLOCK_GRU,
    BOUNDED_NORMAL,
    CATEGORICAL,
    TANH_NORMAL,
    Head,
    Memory,
    meet,
)

if TYPE_CHECKING:
    from phyxdream.ops.rssm_imagine_cpu import PolicyOptions
    from phyxdream.ops.rssm_imagine_triton import Imagined

__all__ = ["Head", "Memory", "plan", "processors", "run"]


class HeadTiles(NamedTuple):
    """How many tiles of features each layer has, and how many layers there are."""

    prior: Any
    policy: Any
    priors: tl.constexpr
    policies: tl.constexpr


@triton.jit(do_not_specialize=["T", "B", "first", "last"])
def imagine_kernel(
    w, l, d, s, n, prior, policy, m, arrivals, T, B, first, last, PHASE: tl.constexpr, LAYER: tl.constexpr,
    GRID: tl.constexpr,
):  # fmt: skip
    """Steps [first, last); all phases, or the one of that number."""
    p, programs, tile = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    met = 0
    for t in tl.range(first, last, num_stages=1):
        for k in tl.static_range(m.policies):
            if PHASE == ALL or (PHASE == 5 and k == LAYER):
                for i in tl.range(p, m.policy[k], programs, num_stages=1):
                    if k == 0:
                        rssm_phases.policy(policy, policy.layers[0], d, s, t, tile, B, i)
                    else:
                        rssm_phases.next_layer(
                            policy.weights[k], policy.layers[k], policy.layers[k - 1], d, s, t, tile, B, i
                        )
                met = meet(arrivals, met, PHASE, GRID)
        if m.policies > 0 and (PHASE == ALL or PHASE == 6):
            if p == 0:
                rssm_phases.draw(policy, policy.layers[m.policies - 1], d, s, t, tile, B)
            met = meet(arrivals, met, PHASE, GRID)
        if PHASE == ALL or PHASE == 0:
            for i in tl.range(p, n.inputs, programs, num_stages=1):
                rssm_phases.inputs(w, l, d, s, t, tile, B, i)
            met = meet(arrivals, met, PHASE, GRID)
        if n.second > 0 and (PHASE == ALL or PHASE == 1):
            for i in tl.range(p, n.second, programs, num_stages=1):
                if s.cell == BLOCK_GRU:
                    rssm_phases.mix(w, l, d, s, t, tile, B, i)
                else:
                    rssm_phases.gates(w, l, d, s, t, tile, B, i)
            met = meet(arrivals, met, PHASE, GRID)
        if PHASE == ALL or PHASE == 2:
            for i in tl.range(p, n.deter, programs, num_stages=1):
                rssm_phases.update(w, l, d, s, t, T, tile, B, i)
            met = meet(arrivals, met, PHASE, GRID)
        for k in tl.static_range(m.priors):
            if PHASE == ALL or (PHASE == 3 and k == LAYER):
                for i in tl.range(p, m.prior[k], programs, num_stages=1):
                    if k == 0:
                        rssm_phases.head(prior.weights[0], s.D, prior.layers[0], d, s, t, tile, B, i)
                    else:
                        rssm_phases.next_layer(
                            prior.weights[k], prior.layers[k], prior.layers[k - 1], d, s, t, tile, B, i
                        )
                met = meet(arrivals, met, PHASE, GRID)
        if PHASE == ALL or PHASE == 4:
            for i in tl.range(p, n.sample, programs, num_stages=1):
                rssm_phases.sample(w, l, d, s, t, T, tile, B, i)
            met = meet(arrivals, met, PHASE, GRID)


def run(model: Imagined, weights: dict[str, Any], prior: Head, policy: Head | None, memory: Memory) -> None:
    """All steps; fills what the fields of memory and policy say. `layers` of the heads are made here."""
    tape = memory.tape
    p = plan(model, weights["out"].element_size() == 2, processors(tape.device))
    memory = memory._replace(sums=tape.new_empty(sums_rows(model, p), model.B))
    given, heads, tiles = _arguments(model, p, weights, prior, policy, memory)
    arrivals = torch.zeros(p.tiles, dtype=torch.int32, device=tape.device)
    options: dict[str, Any] = p.options
    if p.shape == "persistent" and tape.is_cuda:
        options["launch_cooperative_grid"] = True
    with torch.cuda.device_of(tape):
        if p.shape != "split":
            grid, waits = (p.programs, p.tiles), p.shape == "persistent"
            imagine_kernel[grid](
                *given, *heads, tiles, arrivals, model.T, model.B, 0, model.T, PHASE=ALL.value, LAYER=0, GRID=waits,
                **options,
            )  # fmt: skip
            return
        launches = _launched(given[-1], tiles)
        for t in range(model.T):
            for phase, layer, programs in launches:
                imagine_kernel[programs, p.tiles](
                    *given, *heads, tiles, arrivals, model.T, model.B, t, t + 1, PHASE=phase, LAYER=layer,
                    GRID=False, **options,
                )  # fmt: skip


def policy_constants(options: PolicyOptions, actions: int) -> dict[str, tl.constexpr]:
    """The fields of `Head` that are numbers."""
    dists = {"categorical": CATEGORICAL, "bounded_normal": BOUNDED_NORMAL, "tanh_normal": TANH_NORMAL}
    numbers = dict(unimix=options.unimix, min_std=options.min_std, max_std=options.max_std)
    lanes = max(16, triton.next_power_of_2(actions))
    return {
        "dist": dists[options.dist],
        **{k: tl.constexpr(x) for k, x in numbers.items()},
        "LANES": tl.constexpr(lanes),
    }


def _arguments(model: Imagined, plan: Plan, weights, prior, policy, memory):
    given = rssm_observe.arguments(model, plan, weights, memory)
    layers = rssm_observe.layers_of(model, plan, weights)
    heads, counts = [], []
    for owner, head in (("prior", prior), ("policy", policy)):
        names = [] if head is None else [*(f"{owner}{i}" for i in range(len(head.weights)))]
        if owner == "prior":
            names[-1] = "head"
        counts.append(tuple(tl.constexpr(triton.cdiv(model.layers[name][1], plan.columns)) for name in names))
        heads.append(head and head._replace(layers=tuple(layers[name] for name in names)))
    return given, heads, HeadTiles(*counts, *(tl.constexpr(len(x)) for x in counts))


def _launched(n: Tiles, m: HeadTiles) -> list[tuple[int, int, int]]:
    """The phases of a step in the split shape, with the layer of a head and the programs."""
    policy = [(5, k, count.value) for k, count in enumerate(m.policy)]
    cell = [(0, 0, n.inputs.value), (1, 0, n.second.value), (2, 0, n.deter.value)]
    prior = [(3, k, count.value) for k, count in enumerate(m.prior)]
    launches = [*policy, *([(6, 0, 1)] if policy else []), *cell, *prior, (4, 0, n.sample.value)]
    return [launch for launch in launches if launch[2]]
