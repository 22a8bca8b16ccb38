// The scans of an RSSM: what their files share (contract and reference: phyxdream/ops/rssm_observe.py, rssm_imagine.py,
// rssm_cells.py).
//
// A step is a few phases: a policy's layers and its action where the loop is closed, the cell, the layers and the sample
// of the prior or posterior. Sequences are walked in blocks. Several blocks are shared out among the threads, each of
// which takes its own through all steps while activations stay in its caches. One block alone is walked by all threads:
// within a phase they share the tiles of 16 features, and what a phase needs of the whole vector (its mean, say) is
// summed per tile by the phase before. Neither way do results depend on the number of threads.
// What does not recur (the embedding's layer, gradients of weights) is left to whoever calls, in rows of (T·B).
//
// The tape keeps per step what the backward cannot compute cheaply: of every layer its normalised values and 1/σ (or,
// without a norm, its values), and the softmax. Activations are computed again.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "lanes.h"

namespace phyx {

enum class Cell { kGru, kLayerNorm, kBlock };
enum class Act { kIdentity, kSilu, kElu, kRelu };
enum class Policy { kCategorical, kBoundedNormal, kTanhNormal };

constexpr int64_t kSlice = 64;  // features that a table of what one-hots bring keeps together: some 1000 rows fit a cache
constexpr int64_t kUnit = 4;  // groups whose gradients of gains and shifts are summed in one go; blocks are made of them

// What Python gives: addresses of contiguous float32 memory (or None), and numbers, by name.
class Arguments {
 public:
  explicit Arguments(const pybind11::dict& values) {
    for (const auto& [name, value] : values) {
      Value& to = values_[name.cast<std::string>()];
      if (PyFloat_Check(value.ptr()))
        to.number = value.cast<float>();
      else if (!value.is_none())
        to.integer = value.cast<int64_t>();
    }
  }

  template <typename T = float>
  T* address(const std::string& name) const {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(find(name).integer));
  }
  int64_t size(const std::string& name) const { return find(name).integer; }
  float number(const std::string& name) const { return find(name).number; }

 private:
  struct Value {
    int64_t integer = 0;
    float number = 0.0f;
  };
  const Value& find(const std::string& name) const {
    const auto found = values_.find(name);
    if (found == values_.end()) throw std::invalid_argument("missing: " + name);
    return found->second;
  }
  std::unordered_map<std::string, Value> values_;
};

// Norm and activation after a linear map, for all that the map's tiles write.
struct Layer {
  std::string name;
  int64_t size = 0;
  std::vector<Tile> tiles;
  const float *bias = nullptr, *gain = nullptr, *shift = nullptr;
  float eps = 0.0f;
  Act act = Act::kIdentity;
  int64_t tape = 0;     // row of its values in a step of the tape; with a norm, row tape + size is 1/σ
  Lanes out;            // activated values
  Floats partial;       // per tile and group: two sums, each of kLanes
  Lanes grad;           // of what entered the norm
  Floats gain_sum, shift_sum;                       // (units, size, lanes), where they are wanted
  float *out_rows = nullptr, *grad_rows = nullptr;  // (T·B, row_size): for the gradients of weights, where wanted
  int64_t row_size = 0;

  PHYX_INLINE float* sums(int64_t tile, int64_t g, int64_t groups) const {
    return partial.get() + (tile * groups + g) * 2 * kLanes;
  }
};

// Layers, and what they end in: the statistics of a distribution. The first layer reads h, and a policy's also z.
struct Head {
  std::vector<Layer> layers;
  const float* rows = nullptr;         // (T·B, size) that the first layer starts from in place of its bias
  const float* stoch_first = nullptr;  // (B, size) what a categorical z brings to the first layer at step 0
  const float* out_bias = nullptr;
  int64_t statistics = 0;
  std::vector<Tile> tiles;      // of the statistics
  Lanes stat, stoch_sum;        // statistics, later their gradient; what a categorical z brings to the first layer
  float* stat_rows = nullptr;   // (T·B, statistics) gradients, where wanted
  int64_t tape = 0;             // of the softmax, or of a policy's statistics
};

struct HeadWeights {
  Panels deter, stoch, out;
  std::vector<Panels> hidden;  // between layers
  Floats table;                // (slices, Z, kSlice): the transposed weight of a categorical z
};

// Weights as the forward or, transposed, the backward reads them; laid out once for all threads.
struct Weights {
  Panels from_stoch, from_action, from_deter, mix_deter, mix_inputs, gates_x, gates_h, gate[3], gate_h[3];
  HeadWeights state, policy;
  Floats table;  // likewise, of the cell
};

// One thread's view of the problem (all sequences) and its memory (those of a block).
struct Scan {
  Cell cell;
  Policy dist;
  int64_t T, B, A, D, Z, C, U, G, all_groups;
  int64_t first_group = 0, groups = 0;  // of the block being walked
  bool backward, gumbel, cumulative;  // z has the gradient of its Gumbel-softmax, not of p; noise is one number a z
  bool policy_state = false;          // gradients reach a state through the policy that read it
  bool clip_action = false;           // the cell reads a / max(1, |a|)
  float unimix, min_std, policy_unimix, policy_min_std, policy_max_std, policy_offset;

  const float *noise, *action_noise, *deter_first, *stoch_first, *stoch_start, *initial_deter, *initial_stoch;
  const float *input_bias, *hidden_bias, *gates_bias;
  const uint8_t* is_first;
  float *actions, *deter_out, *stoch_out, *stat_out;
  int32_t *index, *classes;  // (T, B, S), and those of one step (groups, S, lanes): threads never write into one line
  const float *grad_deter, *grad_stoch, *grad_stat, *grad_action;
  float *gate_rows, *hidden_gate_rows, *grad_deter_first;

  const Weights* weights;
  Layer in[3], mix, gates;  // in: one, or of block_gru those of h, z and a; gates: the norm of LayerNormGRU
  Head state, policy;       // the prior or posterior, which z is drawn from, and the closed loop's policy, if any
  int parts = 1, stoch_part = 0, action_part = 0;
  std::vector<Tile> in_tiles;  // of all parts; block says which part
  std::vector<Tile> deter_tiles, gate_tiles, stoch_tiles, action_tiles;
  int64_t unit_size = 0;  // statistics that are sampled together: whole tiles and whole variables

  float* tape;  // of all groups and steps, or, where nobody wants it, of one step of a block
  Floats own_tape;
  int64_t tape_rows = 0, tape_step = 0, gates_tape = 0;
  bool keeps_tape;

  std::vector<Floats> memory;
  Lanes action_lanes, stoch_lanes, stoch_sum, deter, previous, next_previous, carry, gate_grad, gate_grad_h,
      action_grad;
  Floats initial_sum;  // (units, D, lanes)
  Floats first;        // (T, groups, lanes): 1 where the state is reset, and in lanes without a sequence

  PHYX_INLINE float* tape_at(int64_t t, int64_t g, int64_t row) const {
    return tape + t * tape_step + (((keeps_tape ? first_group : 0) + g) * tape_rows + row) * kLanes;
  }
  PHYX_INLINE const float* first_at(int64_t t, int64_t g) const { return first.get() + (t * groups + g) * kLanes; }
  PHYX_INLINE int64_t sequence(int64_t g) const { return (first_group + g) * kLanes; }
  PHYX_INLINE int used(int64_t g) const { return static_cast<int>(std::min<int64_t>(kLanes, B - sequence(g))); }
  // The row of the first sequence of a group in (T, B, size).
  PHYX_INLINE int64_t row(int64_t t, int64_t g) const { return t * B + sequence(g); }
};

enum class Phase {
  kPolicy, kLeavePolicy, kAct, kInputs, kLeaveInputs, kMix, kLeaveMix, kGru, kGates, kUpdate, kBlockGates, kState,
  kLeaveState, kSample,
  kStatistics, kStateBack, kLeaveStateBack, kUpdateBack, kGatesBack, kLeaveGatesBack, kMixBack, kLeaveMixBack,
  kInputsBack, kLeaveInputsBack, kDeterBack, kActBack, kPolicyBack, kLeavePolicyBack, kPolicyDeterBack,
};

// Tiles [begin, end) of a phase of step t; `layer` says which one of a head.
using PhaseFunction = void (*)(const Scan* scan, Phase phase, int64_t layer, int64_t t, int64_t begin, int64_t end);
void rssm_forward_phase(const Scan* scan, Phase phase, int64_t layer, int64_t t, int64_t begin, int64_t end);
void rssm_backward_phase(const Scan* scan, Phase phase, int64_t layer, int64_t t, int64_t begin, int64_t end);

}  // namespace phyx
