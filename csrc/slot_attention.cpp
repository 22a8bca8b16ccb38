// Slot attention and its gradients (contract and reference: phyxdream/ops/slot_attention.py).
//
// Keys and values are never made. With h the normalised inputs, without gain and shift, and y the normalised slots,
//   k·q = h·u + c,   u = U y,   c = o·y                      (K vectors u for each element of the batch)
//   input gates of the GRU = G m + bias,   m = Σ w h / Σ w,   w = A + eps
// where U, o and G are products of weights (phyxdream/ops/slot_attention_weights.py). So a pass over the tokens reads h
// alone: K products for the logits, K for the sums. Backward, with e the gradient of m divided by Σ w, and t = m·e, which
// is what Σ_n w (h·e) would give:
//   dA = h·e - t      dl = A ⊙ (dA - Σ_k A dA)      dh += Σ_k dl u + w e      du = Σ_n dl h      dc = Σ_n dl
// The softmax is over slots, so it never leaves a token, and nothing of size N·K is kept.
//
// Both halves lie in lanes (csrc/lanes.h): tokens in tiles of 16, and slots, whatever element they are of, in groups of
// 16. Tokens are walked in chunks of a fixed length, each with its own sums, so threads leave no trace in the result.
#include "slot_attention.h"

#include "bindings.h"

namespace py = pybind11;

namespace phyx {
namespace slots {
namespace {

// Tiles [begin, end) of outputs, those of all weights in a row.
void add_weight_gradients(const SlotCall& c, const std::vector<WeightGradient>& all, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  const int64_t rows = c.factor_rows;
  alignas(64) float sums[2][kTile * kLanes];
  int64_t before = 0;
  for (const WeightGradient& w : all) {
    const int64_t outputs = w.of_outputs->features, inputs = w.inputs->features, tiles = tiled(outputs) / kTile;
    for (int64_t tile = std::max(begin, before); tile < std::min(end, before + tiles); ++tile) {
      const int64_t first = (tile - before) * kTile, count = std::min<int64_t>(kTile, outputs - first);
      const float* panel = w.of_outputs->panels.get() + first * rows;
      for (int64_t i = 0; i < inputs; i += 2 * kTile) {
        const float* x = w.inputs->panels.get() + i * rows;
        const bool two = i + kTile < inputs;
        std::memset(sums, 0, sizeof sums);
        if (two)
          m.two(panel, rows, x, x + kTile * rows, sums[0], sums[1]);
        else
          m.one(panel, rows, x, sums[0]);
        for (int64_t o = 0; o < count; ++o)
          for (int64_t j = i; j < std::min(inputs, i + 2 * kTile); ++j)
            w.weight[(first + o) * inputs + j] += sums[(j - i) / kTile][o * kLanes + (j - i) % kTile];
      }
      if (!w.bias) continue;
      Vector sum[4] = {};  // one would wait for itself
      for (int64_t row = 0; row < rows; row += 4)
        for (int i = 0; i < 4; ++i) sum[i] += vectors(panel)[row + i];
      const Vector all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      for (int64_t o = 0; o < count; ++o) w.bias[first + o] += all[static_cast<int>(o)];
    }
    before += tiles;
  }
}

template <typename T = float>
T* address(const py::dict& arguments, const char* name) {
  const py::object value = arguments[name];
  return value.is_none() ? nullptr : reinterpret_cast<T*>(value.cast<uintptr_t>());
}

void set_up(SlotCall& c, const py::dict& a) {
  const auto size = [&](const char* name) { return a[name].cast<int64_t>(); };
  c.B = size("B"), c.N = size("N"), c.K = size("K"), c.I = size("I"), c.D = size("D"), c.H = size("H");
  c.iterations = size("iterations");
  c.taped = size("taped");
  c.threads = static_cast<int>(size("threads"));
  c.eps = a["eps"].cast<float>();
  c.layer_eps = a["layer_eps"].cast<float>();
  c.inputs = address(a, "inputs");
  c.inputs_element = size("inputs_element");
  c.inputs_token = size("inputs_token");
  c.slots = address(a, "slots");
  c.mask = address<const uint8_t>(a, "slot_mask");
  c.offset_weight = address(a, "offset");
  c.slots_gain = address(a, "slots_gain");
  c.slots_shift = address(a, "slots_shift");
  c.input_bias = address(a, "input_bias");
  c.hidden_bias = address(a, "hidden_bias");
  c.mlp_gain = address(a, "mlp_gain");
  c.mlp_shift = address(a, "mlp_shift");
  c.mlp_in_bias = address(a, "mlp_in_bias");
  c.mlp_out_bias = address(a, "mlp_out_bias");
  c.tape_data = address(a, "tape");
  c.tape = Tape(c.I, c.D, c.H);
  c.tiles = (c.N + kLanes - 1) / kLanes;
  c.chunks = (c.tiles + kChunk - 1) / kChunk;
  c.rows = c.B * c.K;
  c.groups = (c.rows + kLanes - 1) / kLanes;
  c.side_by_side = c.groups < 4 ? 1 : 2;
  c.tokens = Floats(c.B * c.tiles * c.I * kLanes);
  c.inverse = Floats(c.B * c.tiles * kLanes);
  c.query = Floats(c.rows * c.I);
  c.offset = Floats(c.rows);
  c.pooled = Floats(c.B * c.chunks * c.K * c.I);
  c.total = Floats(c.B * c.chunks * c.K);
}

// Items are chunks of tokens; some microseconds of them make a block.
template <typename Body>
void over_tokens(const SlotCall& c, Body&& body) {
  const int64_t tiles = std::min(c.tiles, kChunk);
  parallel_for(c.B * c.chunks, std::max<int64_t>(1, kChunk / tiles), c.threads, body);
}

template <typename Body>
void over_slots(const SlotCall& c, Body&& body) {
  parallel_for((c.groups + c.side_by_side - 1) / c.side_by_side, 1, c.threads, body);
}

void forward(const py::dict& a) {
  SlotCall c{};
  set_up(c, a);
  c.slots_out = address(a, "slots_out");
  c.attention = address(a, "attention");
  const float *to_query = address(a, "query"), *input_gates = address(a, "input_gates"),
              *hidden_gates = address(a, "hidden_gates"), *mlp_in = address(a, "mlp_in"),
              *mlp_out = address(a, "mlp_out");
  py::gil_scoped_release release;
  const int64_t I = c.I, D = c.D, H = c.H;
  c.to_query = Map(I, D, to_query, D, 1, c.threads);
  c.input_gates = Map(3 * D, I, input_gates, I, 1, c.threads);
  c.hidden_gates = Map(3 * D, D, hidden_gates, D, 1, c.threads);
  c.mlp_in = Map(H, D, mlp_in, D, 1, c.threads);
  c.mlp_out = Map(D, H, mlp_out, H, 1, c.threads);
  over_tokens(c, [&](int64_t begin, int64_t end) { slot_normalise_tokens(c, begin, end); });
  for (int64_t i = 0; i <= c.iterations; ++i) {
    over_slots(c, [&](int64_t begin, int64_t end) { slot_forward_rows(c, i, begin, end); });
    if (i < c.iterations)
      over_tokens(c, [&](int64_t begin, int64_t end) { slot_forward_tokens(c, i == c.iterations - 1, begin, end); });
  }
}

void backward(const py::dict& a) {
  SlotCall c{};
  set_up(c, a);
  c.grad_slots = address(a, "grad_slots");
  c.grad_attention = address(a, "grad_attention");
  c.grad_given = address(a, "grad_given");
  c.grad_inputs = address(a, "grad_inputs");
  const char* names[] = {"grad_slots_gain", "grad_slots_shift", "grad_mlp_gain", "grad_mlp_shift", "grad_offset"};
  for (int i = 0; i < 5; ++i) c.vector_grads[i] = address(a, names[i]);
  Factors& f = c.factors;
  const int64_t of_pooled = c.D * c.I, of_slots = c.D * c.D;
  float *of_input = address(a, "grad_input_gates"), *input_bias = address(a, "grad_input_bias"),
        *of_hidden = address(a, "grad_hidden_gates"), *hidden_bias = address(a, "grad_hidden_bias");
  const std::vector<WeightGradient> weights{
      {&f.query, &f.normed, address(a, "grad_query"), nullptr},
      {&f.reset, &f.pooled, of_input, input_bias},
      {&f.update, &f.pooled, of_input + of_pooled, input_bias + c.D},
      {&f.candidate, &f.pooled, of_input + 2 * of_pooled, input_bias + 2 * c.D},
      {&f.reset, &f.slots, of_hidden, hidden_bias},
      {&f.update, &f.slots, of_hidden + of_slots, hidden_bias + c.D},
      {&f.hidden_candidate, &f.slots, of_hidden + 2 * of_slots, hidden_bias + 2 * c.D},
      {&f.from_hidden, &f.mlp_normed, address(a, "grad_mlp_in"), address(a, "grad_mlp_in_bias")},
      {&f.out, &f.hidden, address(a, "grad_mlp_out"), address(a, "grad_mlp_out_bias")},
  };
  const float *to_query = address(a, "query"), *input_gates = address(a, "input_gates"),
              *hidden_gates = address(a, "hidden_gates"), *mlp_in = address(a, "mlp_in"),
              *mlp_out = address(a, "mlp_out");
  py::gil_scoped_release release;
  const int64_t I = c.I, D = c.D, H = c.H;
  c.to_query = Map(D, I, to_query, 1, D, c.threads);
  c.input_gates = Map(I, 3 * D, input_gates, 1, I, c.threads);  // of candidate, reset, update
  c.hidden_gates = Map(D, 3 * D, hidden_gates, 1, D, c.threads);
  c.mlp_in = Map(D, H, mlp_in, 1, D, c.threads);
  c.mlp_out = Map(H, D, mlp_out, 1, H, c.threads);
  const int64_t rows = c.factor_rows = c.taped * c.groups * kLanes;
  f = {Factor(I, rows), Factor(D, rows), Factor(I, rows), Factor(D, rows), Factor(D, rows), Factor(D, rows),
       Factor(D, rows), Factor(D, rows), Factor(H, rows), Factor(D, rows), Factor(D, rows), Factor(H, rows)};
  c.pooled_grad = Floats(c.rows * I);
  c.pooled_dot = Floats(c.rows);
  c.tokens_grad = Floats(c.B * c.tiles * tiled(I) * kLanes);
  c.carry = Floats(c.groups * tiled(D) * kLanes);
  c.vector_sums = Floats(c.groups * 5 * D * kLanes);
  clear(c.vector_sums.get(), c.groups * 5 * D);
  over_tokens(c, [&](int64_t begin, int64_t end) { slot_normalise_tokens(c, begin, end); });
  for (int64_t i = c.iterations; i >= c.iterations - c.taped; --i) {
    over_slots(c, [&](int64_t begin, int64_t end) { slot_backward_rows(c, i, begin, end); });
    if (i > c.iterations - c.taped)
      over_tokens(c, [&](int64_t begin, int64_t end) { slot_backward_tokens(c, i == c.iterations, begin, end); });
  }
  over_tokens(c, [&](int64_t begin, int64_t end) { slot_leave_tokens(c, begin, end); });
  int64_t tiles = 0;
  for (const WeightGradient& w : weights) tiles += tiled(w.of_outputs->features) / kTile;
  parallel_for(tiles, 1, c.threads, [&](int64_t begin, int64_t end) { add_weight_gradients(c, weights, begin, end); });
  for (int64_t g = 0; g < c.groups; ++g) {
    const float* from = c.vector_sums.get() + g * 5 * D * kLanes;
    for (float* to : c.vector_grads)
      for (int64_t i = 0; i < D; ++i, from += kLanes)
        for (int l = 0; l < kLanes; ++l) to[i] += from[l];
  }
}

}  // namespace
}  // namespace slots

void bind_slot_attention(py::module_& module) {
  module.def("slot_attention_forward", &slots::forward);
  module.def("slot_attention_backward", &slots::backward);
}

}  // namespace phyx
