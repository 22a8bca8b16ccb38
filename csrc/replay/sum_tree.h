// Numbers with a running sum: any of them can change, and one can be drawn in proportion to its size, in O(log n).
#pragma once
#include <algorithm>
#include <cstddef>
#include <vector>

namespace phyx::replay {

// Inner nodes are summed anew from their children at every change, so rounding errors do not pile up.
class SumTree {
 public:
  explicit SumTree(std::size_t leaves) {
    do {
      leaves = (leaves + kFanout - 1) / kFanout;
      levels_.emplace_back(leaves * kFanout, 0.0);
    } while (leaves > 1);
  }

  double operator[](std::size_t leaf) const { return levels_[0][leaf]; }

  double total() const { return sum(levels_.back().data()); }

  void set(std::size_t leaf, double value) {
    levels_[0][leaf] = value;
    for (std::size_t level = 1; level < levels_.size(); ++level) {
      leaf /= kFanout;
      levels_[level][leaf] = sum(&levels_[level - 1][leaf * kFanout]);
    }
  }

  // The leaf that [0, total) is at when all leaves are laid end to end. Never one of size zero.
  std::size_t find(double at) const {
    std::size_t node = 0;
    for (std::size_t level = levels_.size(); level-- > 0;) {
      const double* child = &levels_[level][node * kFanout];
      std::size_t pick = 0, last = 0;
      for (std::size_t i = 0; i < kFanout; ++i)
        if (child[i] > 0) last = i;
      while (pick < last && (child[pick] == 0 || at >= child[pick])) at -= child[pick++];
      node = node * kFanout + pick;
    }
    return node;
  }

 private:
  static constexpr std::size_t kFanout = 8;

  static double sum(const double* child) {
    return ((child[0] + child[1]) + (child[2] + child[3])) + ((child[4] + child[5]) + (child[6] + child[7]));
  }

  std::vector<std::vector<double>> levels_;  // leaves first; every level filled up with zeros to whole nodes
};

}  // namespace phyx::replay
