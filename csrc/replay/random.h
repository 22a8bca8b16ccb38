// The generator behind sampling: small, fast, and with a state that is saved with the buffer.
#pragma once
#include <array>
#include <cstdint>

namespace phyx::replay {

// xoshiro256++ (Blackman & Vigna 2019), seeded by splitmix64 as its authors advise.
class Random {
 public:
  using State = std::array<std::uint64_t, 4>;

  explicit Random(std::uint64_t seed) {
    for (auto& word : state_) {
      std::uint64_t z = (seed += 0x9e3779b97f4a7c15u);
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
      z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
      word = z ^ (z >> 31);
    }
  }

  std::uint64_t next() {
    const std::uint64_t result = rotate(state_[0] + state_[3], 23) + state_[0];
    const std::uint64_t t = state_[1] << 17;
    state_[2] ^= state_[0];
    state_[3] ^= state_[1];
    state_[1] ^= state_[2];
    state_[0] ^= state_[3];
    state_[2] ^= t;
    state_[3] = rotate(state_[3], 45);
    return result;
  }

  // Uniform in [0, bound), without the bias of a plain modulo (Lemire 2019). bound > 0.
  std::uint64_t below(std::uint64_t bound) {
    Wide product = Wide(next()) * bound;
    if (std::uint64_t(product) < bound) {
      const std::uint64_t threshold = -bound % bound;
      while (std::uint64_t(product) < threshold) product = Wide(next()) * bound;
    }
    return std::uint64_t(product >> 64);
  }

  // Uniform in [0, 1), a multiple of 2^-53.
  double unit() { return double(next() >> 11) * 0x1p-53; }

  const State& state() const { return state_; }
  void restore(const State& state) { state_ = state; }

 private:
  __extension__ using Wide = unsigned __int128;
  static std::uint64_t rotate(std::uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }
  State state_;
};

}  // namespace phyx::replay
