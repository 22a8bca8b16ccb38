// Set-up of the scans, the order of their phases, and their backward (see rssm_scan.h).
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>

#include "bindings.h"
#include "rssm_layers.h"
#include "vector.h"

namespace py = pybind11;

namespace phyx {
namespace {

int64_t count(const std::vector<Tile>& tiles) { return static_cast<int64_t>(tiles.size()); }

Floats zeros(int64_t size) {
  Floats floats(size);
  std::memset(floats.get(), 0, sizeof(float) * size);
  return floats;
}

// ---------------------------------------------------------------------------------------------------------------------
// A thread's memory.

Lanes lanes(Scan& s, int64_t features) {
  s.memory.push_back(zeros(s.groups * features * kLanes));
  return {s.memory.back().get(), features * kLanes};
}

int64_t units(const Scan& s) { return (s.groups + kUnit - 1) / kUnit; }

Layer make_layer(Scan& s, const Arguments& a, const std::string& name, int64_t size, int64_t blocks) {
  Layer layer;
  layer.name = name;
  layer.size = size;
  layer.tiles = tiles_of(size, blocks);
  layer.bias = a.address(name + "_bias");
  layer.gain = a.address(name + "_gain");
  layer.shift = a.address(name + "_shift");
  layer.eps = a.number(layer.shift ? "layer_eps" : "rms_eps");
  layer.act = static_cast<Act>(a.size("act"));
  layer.tape = s.tape_rows;
  s.tape_rows += size + (layer.gain ? 1 : 0);
  layer.partial = Floats(count(layer.tiles) * s.groups * 2 * kLanes);
  layer.row_size = size;
  if (s.backward) {
    layer.grad_rows = a.address(name + "_grad_rows");
    layer.out_rows = a.address(name + "_out_rows");
    if (a.address("grad_" + name + "_gain") || a.address("grad_" + name + "_shift")) {
      layer.gain_sum = Floats(units(s) * size * kLanes);
      layer.shift_sum = Floats(units(s) * size * kLanes);
    }
  }
  return layer;
}

// Where a layer's values or gradients go; others may share the buffer: its features start at `start` of `size`.
void place(const Scan& s, Layer& layer, const Lanes& to, int64_t start, int64_t size) {
  (s.backward ? layer.grad : layer.out) = {to.at(0, start), to.group};
  layer.row_size = size;
  if (layer.grad_rows) layer.grad_rows += start;
  if (layer.out_rows) layer.out_rows += start;
}

Head make_head(Scan& s, const Arguments& a, const std::string& name, int64_t statistics) {
  Head head;
  for (int64_t i = 0; i < a.size(name + "_layers"); ++i) {
    const std::string layer = name + std::to_string(i);
    const int64_t size = a.size(layer + "_size");
    head.layers.push_back(make_layer(s, a, layer, size, 1));
    place(s, head.layers.back(), lanes(s, size), 0, size);
  }
  head.out_bias = a.address(name + "_out_bias");
  head.statistics = statistics;
  head.tiles = tiles_of(statistics);
  head.stat = lanes(s, statistics);
  if (s.backward) head.stat_rows = a.address(name + "_rows");
  head.tape = s.tape_rows;
  return head;
}

// Everything both directions share, for blocks of at most `groups` groups. `scan` must stay where it is.
void set_up(Scan& s, const Arguments& a, const Weights& weights, int64_t groups, bool backward) {
  s.backward = backward;
  s.weights = &weights;
  s.cell = static_cast<Cell>(a.size("cell"));
  s.dist = static_cast<Policy>(a.size("dist"));
  for (auto& [name, to] : {std::pair<const char*, int64_t*>{"T", &s.T}, {"B", &s.B}, {"A", &s.A}, {"D", &s.D},
                           {"Z", &s.Z}, {"C", &s.C}, {"U", &s.U}, {"G", &s.G}})
    *to = a.size(name);
  s.all_groups = (s.B + kLanes - 1) / kLanes;
  s.groups = groups;
  s.gumbel = a.size("gumbel") != 0;
  s.cumulative = a.size("cumulative") != 0;
  for (auto& [name, to] : {std::pair<const char*, float*>{"unimix", &s.unimix}, {"min_std", &s.min_std},
                           {"policy_unimix", &s.policy_unimix}, {"policy_min_std", &s.policy_min_std},
                           {"policy_max_std", &s.policy_max_std}})
    *to = a.number(name);
  s.policy_offset = static_cast<float>(std::log(std::expm1(5.0)));
  s.is_first = a.address<uint8_t>("is_first");
  s.index = a.address<int32_t>("index");
  for (auto& [name, to] : {std::pair<const char*, const float**>{"noise", &s.noise}, {"action_noise", &s.action_noise},
                           {"deter", &s.deter_first}, {"initial_deter", &s.initial_deter}})
    *to = a.address(name);
  for (auto& [name, to] : {std::pair<const char*, float**>{"action", &s.actions}, {"deter_out", &s.deter_out},
                           {"stoch_out", &s.stoch_out}, {"statistics_out", &s.stat_out}, {"tape", &s.tape}})
    *to = a.address(name);

  const bool block = s.cell == Cell::kBlock, closed = a.size("policy_layers") > 0;
  s.parts = block ? 3 : 1;
  s.stoch_part = block ? 1 : 0;
  s.action_part = block ? 2 : 0;
  const char* names[] = {block ? "in_deter" : "in", "in_stoch", "in_action"};
  const Lanes inputs = lanes(s, s.parts * s.U);
  for (int part = 0; part < s.parts; ++part) {
    s.in[part] = make_layer(s, a, names[part], s.U, 1);
    place(s, s.in[part], inputs, part * s.U, s.parts * s.U);
    for (Tile tile : s.in[part].tiles) s.in_tiles.push_back({tile.start, tile.count, part});
  }
  if (block) {
    s.mix = make_layer(s, a, "mix", s.D, s.G);
    place(s, s.mix, lanes(s, s.D), 0, s.D);
  }
  s.gates_tape = s.tape_rows;
  if (s.cell == Cell::kLayerNorm) {
    s.gates = make_layer(s, a, "gates", 3 * s.D, 1);
    s.gates.act = Act::kIdentity;
  } else {
    s.tape_rows += (block ? 3 : 4) * s.D;
  }
  s.state = make_head(s, a, "state", s.C > 0 ? s.Z : 2 * s.Z);
  s.state.rows = a.address("state_first_rows");
  if (s.C > 0) s.tape_rows += s.Z;
  if (closed) {
    s.policy = make_head(s, a, "policy", s.dist == Policy::kCategorical ? s.A : 2 * s.A);
    s.policy.stoch_first = a.address("policy_stoch_first");
    s.tape_rows += s.policy.statistics;
    for (Layer& layer : s.policy.layers) layer.act = static_cast<Act>(a.size("policy_act"));
    s.policy_state = a.size("detach_feature") == 0;
    s.clip_action = a.size("clip_action") != 0;
  }
  s.keeps_tape = s.tape != nullptr;
  if (s.keeps_tape) {
    s.tape_step = s.all_groups * s.tape_rows * kLanes;
    if (s.tape_step * s.T != a.size("tape_size"))
      throw std::invalid_argument("tape: not of the size that this call writes");
  } else {
    s.own_tape = Floats(s.groups * s.tape_rows * kLanes);
    s.tape = s.own_tape.get();
  }

  s.deter_tiles = tiles_of(s.D, block ? s.G : 1);
  s.gate_tiles = tiles_of(3 * s.D);
  s.stoch_tiles = tiles_of(s.Z);
  s.action_tiles = tiles_of(s.A);
  s.unit_size = s.C > 0 ? std::lcm<int64_t>(kTile, s.C) : s.state.statistics;
  s.first = Floats(s.T * s.groups * kLanes);
  s.action_lanes = lanes(s, backward ? s.A : s.T * s.A);

  if (backward) {
    for (auto& [name, to] :
         {std::pair<const char*, const float**>{"grad_deter", &s.grad_deter}, {"grad_stoch", &s.grad_stoch},
          {"grad_statistics", &s.grad_stat}, {"grad_action", &s.grad_action}})
      *to = a.address(name);
    for (auto& [name, to] : {std::pair<const char*, float**>{"gate_rows", &s.gate_rows},
                             {"hidden_gate_rows", &s.hidden_gate_rows}, {"grad_deter_first", &s.grad_deter_first}})
      *to = a.address(name);
    s.gate_grad = lanes(s, 3 * s.D);
    if (s.cell == Cell::kGru) s.gate_grad_h = lanes(s, 3 * s.D);
    if (s.cell == Cell::kLayerNorm) s.gates.grad = s.gate_grad;
    s.carry = lanes(s, s.D);
    s.initial_sum = Floats(units(s) * s.D * kLanes);
    if (closed) s.action_grad = lanes(s, s.A);
    return;
  }
  for (auto& [name, to] :
       {std::pair<const char*, const float**>{"stoch_first", &s.stoch_first}, {"stoch_start", &s.stoch_start},
        {"initial_stoch", &s.initial_stoch}, {"input_bias", &s.input_bias}, {"hidden_bias", &s.hidden_bias},
        {"gates_bias", &s.gates_bias}})
    *to = a.address(name);
  if (s.C > 0) {
    s.stoch_sum = lanes(s, s.U);
    s.classes = reinterpret_cast<int32_t*>(lanes(s, s.Z / s.C).data);
  } else {
    s.stoch_lanes = lanes(s, s.Z);
  }
  if (s.C > 0 && closed) s.policy.stoch_sum = lanes(s, s.policy.layers[0].size);
  s.deter = lanes(s, s.D);
  s.previous = lanes(s, s.D);
  s.next_previous = lanes(s, s.D);
}

// ---------------------------------------------------------------------------------------------------------------------
// Weights.

constexpr int64_t kReads = 4;  // with fewer of them, weights are read where they lie

// Threads that lay weights out.
int layout_threads(const Scan& s, int threads) { return s.T * s.all_groups < kReads ? 0 : threads; }

// The transposed weight (size, Z) with rows of `row` floats, in slices. The first step reads none of it.
Floats transposed(const Scan& s, const float* weight, int64_t size, int64_t row, int threads) {
  if (s.T == 1) return {};
  const int64_t slices = (size + kSlice - 1) / kSlice, Z = s.Z;
  Floats table(slices * Z * kSlice);
  parallel_for(slices * Z, 64, threads, [&](int64_t begin, int64_t end) {
    for (int64_t u0 = 0; u0 < kSlice; u0 += kTile)  // so that neither side strides through memory for long
      for (int64_t i = begin; i < end; ++i)
        for (int64_t u = u0; u < u0 + kTile; ++u) {
          const int64_t feature = i / Z * kSlice + u;
          table.get()[i * kSlice + u] = feature < size ? weight[feature * row + i % Z] : 0.0f;
        }
  });
  return table;
}

HeadWeights head_weights(const Scan& s, const Arguments& a, const Head& head, const std::string& name, int threads) {
  HeadWeights w;
  const auto size = [](const std::vector<Tile>& tiles) { return tiles.back().start + tiles.back().count; };
  const auto panels = [&](const std::vector<Tile>& in, const std::vector<Tile>& out, const float* weight, int64_t row) {
    return s.backward ? Panels(in, size(out), weight, 1, row, s.D / s.G, threads)  // those of h come in blocks
                      : Panels(out, size(in), weight, row, 1, 0, threads);
  };
  const auto& layers = head.layers;
  const float* first = a.address(layers[0].name);
  const int64_t row = a.size(layers[0].name + "_row");
  w.deter = panels(s.deter_tiles, layers[0].tiles, first, row);
  if (&head == &s.policy) {
    if (s.C > 0 && !s.backward)
      w.table = transposed(s, first + s.D, layers[0].size, row, threads);
    else
      w.stoch = panels(s.stoch_tiles, layers[0].tiles, first + s.D, row);
  }
  for (size_t i = 1; i < layers.size(); ++i)
    w.hidden.push_back(
        panels(layers[i - 1].tiles, layers[i].tiles, a.address(layers[i].name), a.size(layers[i].name + "_row")));
  w.out = panels(layers.back().tiles, head.tiles, a.address(name + "_out"), layers.back().size);
  return w;
}

void forward_weights(Weights& w, const Scan& s, const Arguments& a, int threads) {
  const int64_t D = s.D, U = s.U, size = D / s.G;
  const auto& tiles = s.in[0].tiles;
  const float *in_stoch = a.address("in_stoch"), *gates = a.address("gates");
  w.from_action = Panels(tiles, s.A, a.address("in_action"), s.A, 1, 0, 1);
  if (s.C > 0)
    w.table = transposed(s, in_stoch, U, s.Z, threads);
  else
    w.from_stoch = Panels(tiles, s.Z, in_stoch, s.Z, 1, 0, threads);
  if (s.cell == Cell::kGru) {
    const float* hidden = a.address("hidden_gates");
    for (int k = 0; k < 3; ++k) {
      w.gate[k] = Panels(s.deter_tiles, U, gates + k * D * U, U, 1, 0, threads);
      w.gate_h[k] = Panels(s.deter_tiles, D, hidden + k * D * D, D, 1, 0, threads);
    }
  } else if (s.cell == Cell::kLayerNorm) {
    w.gates_x = Panels(s.gate_tiles, U, gates, U + D, 1, 0, threads);
    w.gates_h = Panels(s.gate_tiles, D, gates + U, U + D, 1, 0, threads);
  } else {
    w.from_deter = Panels(tiles, D, a.address("in_deter"), D, 1, 0, threads);
    w.mix_deter = Panels(s.deter_tiles, size, a.address("mix_deter"), 1, size, size * size, threads);
    w.mix_inputs = Panels(s.deter_tiles, 3 * U, a.address("mix_inputs"), 3 * U, 1, size * 3 * U, threads);
    for (int k = 0; k < 3; ++k)
      w.gate[k] = Panels(s.deter_tiles, size, gates + k * size, 1, 3 * size, 3 * size * size, threads);
  }
  w.state = head_weights(s, a, s.state, "state", threads);
  if (!s.policy.layers.empty()) w.policy = head_weights(s, a, s.policy, "policy", threads);
}

void backward_weights(Weights& w, const Scan& s, const Arguments& a, int threads) {
  const int64_t D = s.D, U = s.U, size = D / s.G;
  const auto& tiles = s.in[0].tiles;
  const float *in_stoch = a.address("in_stoch"), *gates = a.address("gates");
  w.from_stoch = Panels(s.stoch_tiles, U, in_stoch, 1, s.Z, 0, threads);
  if (s.cell == Cell::kGru) {
    w.gates_x = Panels(tiles, 3 * D, gates, 1, U, 0, threads);
    w.gates_h = Panels(s.deter_tiles, 3 * D, a.address("hidden_gates"), 1, D, 0, threads);
  } else if (s.cell == Cell::kLayerNorm) {
    w.gates_x = Panels(tiles, 3 * D, gates, 1, U + D, 0, threads);
    w.gates_h = Panels(s.deter_tiles, 3 * D, gates + U, 1, U + D, 0, threads);
  } else {
    w.gates_x = Panels(s.deter_tiles, 3 * size, gates, 3 * size, 1, 3 * size * size, threads);
    std::vector<Tile> input_tiles;  // of (3U), none across two parts
    for (const Tile& tile : s.in_tiles) input_tiles.push_back({tile.block * U + tile.start, tile.count, tile.block});
    w.mix_inputs = Panels(input_tiles, D, a.address("mix_inputs"), 1, 3 * U, U, threads);
    w.mix_deter = Panels(s.deter_tiles, size, a.address("mix_deter"), size, 1, size * size, threads);
    w.from_deter = Panels(s.deter_tiles, U, a.address("in_deter"), 1, D, size, threads);
  }
  w.state = head_weights(s, a, s.state, "state", threads);
  if (s.policy.layers.empty()) return;
  w.policy = head_weights(s, a, s.policy, "policy", threads);
  w.from_action = Panels(s.action_tiles, U, a.address("in_action"), 1, s.A, 0, threads);
}

// ---------------------------------------------------------------------------------------------------------------------
// A block of sequences through all steps.

class Runner {
 public:
  Runner(const Scan& s, PhaseFunction function, int threads) : s_(s), function_(function), threads_(threads) {}

  // `grain` tiles at a time, a multiple of `unit`, so that threads which start late or are interrupted leave the rest to
  // others.
  void operator()(Phase phase, int64_t t, int64_t tiles, int64_t layer = 0, int64_t unit = 1) const {
    const int64_t share = 3 * threads_ * unit, grain = std::max<int64_t>(1, (tiles + share - 1) / share) * unit;
    parallel_for(tiles, grain, threads_, [&](int64_t begin, int64_t end) {
      function_(&s_, phase, layer, t, begin, end);
    });
  }

  void layers(const Head& head, Phase phase, Phase leave, int64_t t) const {
    for (int64_t i = 0; i < static_cast<int64_t>(head.layers.size()); ++i) layer(head, phase, leave, t, i);
  }

  void layers_back(const Head& head, Phase phase, Phase leave, int64_t t) const {
    for (int64_t i = static_cast<int64_t>(head.layers.size()) - 1; i >= 0; --i) layer(head, phase, leave, t, i);
  }

 private:
  void layer(const Head& head, Phase phase, Phase leave, int64_t t, int64_t i) const {
    const int64_t tiles = count(head.layers[i].tiles);
    (*this)(phase, t, tiles, i);
    if (head.layers[i].gain) (*this)(leave, t, tiles, i);
  }

  const Scan& s_;
  PhaseFunction function_;
  int threads_;
};

void leave_inputs(const Scan& s, const Runner& run, Phase phase, int64_t t) {
  for (int part = 0; part < s.parts; ++part)
    if (s.in[part].gain) run(phase, t, count(s.in[part].tiles), part);
}

void enter_block(Scan& s, int64_t block, int64_t groups) {
  s.first_group = block * groups;
  s.groups = std::min(groups, s.all_groups - s.first_group);
  for (int64_t t = 0; t < s.T; ++t)
    for (int64_t i = 0; i < s.groups * kLanes; ++i) {
      const int64_t b = s.first_group * kLanes + i;
      s.first.get()[t * s.groups * kLanes + i] = b >= s.B || (s.is_first && s.is_first[t * s.B + b]) ? 1.0f : 0.0f;
    }
}

void put_classes(const Scan& s, int64_t t) {
  const int64_t S = s.Z / s.C;
  for (int64_t g = 0; g < s.groups; ++g)
    for (int l = 0; l < s.used(g); ++l)
      for (int64_t v = 0; v < S; ++v) s.index[(s.row(t, g) + l) * S + v] = s.classes[(g * S + v) * kLanes + l];
}

void walk(Scan& s, int threads) {
  const bool closed = !s.policy.layers.empty();
  for (int64_t g = 0; g < s.groups; ++g) {
    if (s.C == 0)  // `stoch_first` is the z of step 0, resets made
      from_rows(s.stoch_lanes.at(g, 0), s.stoch_first + s.sequence(g) * s.Z, s.Z, s.used(g), static_cast<int>(s.Z));
    for (int64_t t = 0; !closed && t < s.T; ++t)
      from_rows(s.action_lanes.at(g, t * s.A), s.actions + s.row(t, g) * s.A, s.A, s.used(g), static_cast<int>(s.A));
    for (const Tile& tile : s.deter_tiles) load_previous(s, s.previous.at(g, tile.start), tile, 0, g);
  }
  const Runner run(s, rssm_forward_phase, threads);
  for (int64_t t = 0; t < s.T; ++t) {
    run.layers(s.policy, Phase::kPolicy, Phase::kLeavePolicy, t);
    if (closed) run(Phase::kAct, t, 1);
    run(Phase::kInputs, t, count(s.in_tiles), 0, kSlice / kTile);
    leave_inputs(s, run, Phase::kLeaveInputs, t);
    if (s.cell == Cell::kGru) {
      run(Phase::kGru, t, count(s.deter_tiles));
    } else if (s.cell == Cell::kLayerNorm) {
      run(Phase::kGates, t, count(s.gate_tiles));
      run(Phase::kUpdate, t, count(s.deter_tiles));
    } else {
      run(Phase::kMix, t, count(s.deter_tiles));
      if (s.mix.gain) run(Phase::kLeaveMix, t, count(s.deter_tiles));
      run(Phase::kBlockGates, t, count(s.deter_tiles));
    }
    run.layers(s.state, Phase::kState, Phase::kLeaveState, t);
    run(Phase::kSample, t, (s.state.statistics + s.unit_size - 1) / s.unit_size);
    if (s.C > 0) put_classes(s, t);
    std::swap(s.previous, s.next_previous);
  }
}

void walk_back(Scan& s, int threads) {
  const bool closed = !s.policy.layers.empty();
  for (int64_t g = 0; g < s.groups; ++g) std::memset(s.carry.at(g, 0), 0, sizeof(float) * s.D * kLanes);
  const Runner run(s, rssm_backward_phase, threads);
  for (int64_t t = s.T - 1; t >= 0; --t) {
    run(Phase::kStatistics, t, (s.Z + s.unit_size - 1) / s.unit_size);
    run.layers_back(s.state, Phase::kStateBack, Phase::kLeaveStateBack, t);
    run(Phase::kUpdateBack, t, count(s.deter_tiles));
    if (s.cell == Cell::kLayerNorm) {
      run(Phase::kGatesBack, t, count(s.gate_tiles));
      run(Phase::kLeaveGatesBack, t, count(s.gate_tiles));
    }
    if (s.cell == Cell::kBlock) {
      run(Phase::kMixBack, t, count(s.deter_tiles));
      if (s.mix.gain) run(Phase::kLeaveMixBack, t, count(s.deter_tiles));
    }
    run(Phase::kInputsBack, t, count(s.in_tiles) + count(s.deter_tiles));
    leave_inputs(s, run, Phase::kLeaveInputsBack, t);
    if (s.cell == Cell::kBlock) run(Phase::kDeterBack, t, count(s.deter_tiles));
    if (!closed) continue;
    run(Phase::kActBack, t, 1);
    run.layers_back(s.policy, Phase::kPolicyBack, Phase::kLeavePolicyBack, t);
    if (s.policy_state) run(Phase::kPolicyDeterBack, t, count(s.deter_tiles));
  }
  for (int64_t g = 0; g < s.groups; ++g)
    to_rows(s.grad_deter_first + s.sequence(g) * s.D, s.D, s.used(g), s.carry.at(g, 0), static_cast<int>(s.D));
}

// Calls body(scan, block, threads) for every block, each with a scan that no other thread uses.
template <typename Body>
void for_blocks(std::vector<Scan>& scans, int64_t blocks, int64_t groups, int threads, Body&& body) {
  const int workers = static_cast<int>(scans.size());
  std::atomic<int64_t> next{0};
  parallel_for(workers, 1, workers, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t block; (block = next.fetch_add(1)) < blocks;) {
        enter_block(scans[worker], block, groups);
        body(scans[worker], block, workers == 1 ? threads : 1);
      }
  });
}

std::vector<Scan> make_scans(const Arguments& a, const Weights& weights, bool backward) {
  const int64_t groups = a.size("block"), all = (a.size("B") + kLanes - 1) / kLanes, blocks = (all + groups - 1) / groups;
  std::vector<Scan> scans(std::min(blocks, a.size("threads")));
  for (Scan& s : scans) set_up(s, a, weights, groups, backward);
  return scans;
}

void forward(const py::dict& arguments) {
  const Arguments a(arguments);
  py::gil_scoped_release release;
  const int threads = static_cast<int>(a.size("threads"));
  const int64_t groups = a.size("block");
  Weights weights;
  std::vector<Scan> scans = make_scans(a, weights, false);
  forward_weights(weights, scans[0], a, layout_threads(scans[0], threads));
  for_blocks(scans, (scans[0].all_groups + groups - 1) / groups, groups, threads,
             [](Scan& s, int64_t, int sharing) { walk(s, sharing); });
}

void backward(const py::dict& arguments) {
  const Arguments a(arguments);
  py::gil_scoped_release release;
  const int threads = static_cast<int>(a.size("threads"));
  const int64_t groups = a.size("block");
  Weights weights;
  std::vector<Scan> scans = make_scans(a, weights, true);
  backward_weights(weights, scans[0], a, layout_threads(scans[0], threads));
  const int64_t blocks = (scans[0].all_groups + groups - 1) / groups;

  // Every unit's sums over its lanes go to rows of their own, so that adding them up has one order.
  const auto summed = [&](Scan& s) {
    std::vector<std::pair<Floats*, std::pair<float*, int64_t>>> found;
    const auto add = [&](Layer& layer) {
      if (!layer.gain_sum.get()) return;
      found.push_back({&layer.gain_sum, {a.address("grad_" + layer.name + "_gain"), layer.size}});
      found.push_back({&layer.shift_sum, {a.address("grad_" + layer.name + "_shift"), layer.size}});
    };
    for (int part = 0; part < s.parts; ++part) add(s.in[part]);
    add(s.mix);
    add(s.gates);
    for (Layer& layer : s.state.layers) add(layer);
    for (Layer& layer : s.policy.layers) add(layer);
    found.push_back({&s.initial_sum, {a.address("grad_initial_deter"), s.D}});
    return found;
  };
  int64_t width = 0;
  for (const auto& [floats, to] : summed(scans[0])) width += to.second;
  const int64_t all_units = (scans[0].all_groups + kUnit - 1) / kUnit;
  const Floats rows(all_units * width);
  for_blocks(scans, blocks, groups, threads, [&](Scan& s, int64_t block, int sharing) {
    const auto sums = summed(s);
    for (const auto& [floats, to] : sums) std::memset(floats->get(), 0, sizeof(float) * units(s) * to.second * kLanes);
    walk_back(s, sharing);
    for (int64_t unit = 0; unit < units(s); ++unit) {
      float* row = rows.get() + (block * ((groups + kUnit - 1) / kUnit) + unit) * width;
      for (const auto& [floats, to] : sums)
        for (int64_t i = 0; i < to.second; ++i) {
          const float* lane = floats->get() + (unit * to.second + i) * kLanes;
          *row++ = std::accumulate(lane, lane + kLanes, 0.0f);
        }
    }
  });
  int64_t start = 0;
  for (const auto& [floats, to] : summed(scans[0])) {
    const auto& [grad, size] = to;
    for (int64_t i = 0; grad && i < size; ++i) {
      grad[i] = 0.0f;
      for (int64_t unit = 0; unit < all_units; ++unit) grad[i] += rows.get()[unit * width + start + i];
    }
    start += size;
  }
}

}  // namespace

namespace {

template <int64_t kWidth>  // or 0: `some`
PHYX_INLINE void add_rows(float* __restrict table, int64_t some, const float* grad, int64_t row, int64_t count,
                          const int32_t* index, int64_t S, int64_t C, const uint8_t* left_out) {
  const int64_t width = kWidth ? kWidth : some;
  for (int64_t n = 0; n < count; ++n) {
    if (left_out && left_out[n]) continue;
    const float* __restrict from = grad + n * row;
    for (int64_t v = 0; v < S; ++v) {
      float* __restrict sum = table + (v * C + index[n * S + v]) * width;
      for (int64_t i = 0; i < width; ++i) sum[i] += from[i];
    }
  }
}

}  // namespace

// table (S·C, width) += onehotᵀ grad, whose rows are `row` floats apart; to (width, S·C) is then its transpose.
PHYX_MULTIVERSION void add_rows_of_classes(float* table, int64_t width, const float* grad, int64_t row, int64_t count,
                                           const int32_t* index, int64_t S, int64_t C, const uint8_t* left_out,
                                           float* to) {
  if (width == kSlice)
    add_rows<kSlice>(table, width, grad, row, count, index, S, C, left_out);
  else
    add_rows<0>(table, width, grad, row, count, index, S, C, left_out);
  transpose(to, S * C, table, width, static_cast<int>(S * C), static_cast<int>(width));
}

namespace {

// to (size, S·C) = gradᵀ onehot: of a weight that reads z. grad: (address, rows, size, stride of rows); index (rows, S)
// says which classes are one, but where `left_out` (rows,).
void one_hot_product(uintptr_t to, py::tuple grad, uintptr_t index, int64_t S, int64_t C, uintptr_t left_out,
                     int threads) {
  const auto* from = reinterpret_cast<const float*>(grad[0].cast<uintptr_t>());
  const auto count = grad[1].cast<int64_t>(), size = grad[2].cast<int64_t>(), row = grad[3].cast<int64_t>();
  py::gil_scoped_release release;
  parallel_for((size + kSlice - 1) / kSlice, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i * kSlice, width = std::min(kSlice, size - begin);
      const Floats table = zeros(S * C * width);
      add_rows_of_classes(table.get(), width, from + begin, row, count, reinterpret_cast<const int32_t*>(index), S, C,
                          reinterpret_cast<const uint8_t*>(left_out), reinterpret_cast<float*>(to) + begin * S * C);
    }
  });
}

// to (T, B, D): what every step started from, the result (T, B, D) of the one before or, at first, `deter` (B, D); or
// `initial` (D,) where `is_first` (T, B).
void states_before(uintptr_t to, uintptr_t deter, uintptr_t result, uintptr_t is_first, uintptr_t initial, int64_t T,
                   int64_t B, int64_t D, int threads) {
  const auto at = [](uintptr_t address) { return reinterpret_cast<const float*>(address); };
  const auto* first = reinterpret_cast<const uint8_t*>(is_first);
  py::gil_scoped_release release;
  parallel_for(T * B, 64, threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const float* before = n < B ? at(deter) + n * D : at(result) + (n - B) * D;
      std::memcpy(reinterpret_cast<float*>(to) + n * D, first && first[n] ? at(initial) : before, sizeof(float) * D);
    }
  });
}

}  // namespace

void bind_rssm_scan(py::module_& module) {
  module.def("rssm_scan_forward", &forward);
  module.def("rssm_scan_backward", &backward);
  module.def("one_hot_product", &one_hot_product);
  module.def("states_before", &states_before);
}

}  // namespace phyx
