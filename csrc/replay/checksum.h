// XXH64 over a stream, from its published specification: one portable code path, and faster than any disk.
#pragma once
#include <cstddef>
#include <cstdint>

namespace phyx::replay {

class Checksum {
 public:
  void update(const void* data, std::size_t bytes);
  std::uint64_t value() const;

 private:
  static constexpr std::size_t kStripe = 32;
  void stripe(const unsigned char* data);

  static constexpr std::uint64_t kPrime1 = 0x9e3779b185ebca87u, kPrime2 = 0xc2b2ae3d27d4eb4fu,
                                 kPrime3 = 0x165667b19e3779f9u, kPrime4 = 0x85ebca77c2b2ae63u,
                                 kPrime5 = 0x27d4eb2f165667c5u;
  std::uint64_t lane_[4] = {kPrime1 + kPrime2, kPrime2, 0, 0u - kPrime1};
  std::uint64_t total_ = 0;
  unsigned char rest_[kStripe] = {};  // the total_ % kStripe bytes that do not fill a stripe yet
};

}  // namespace phyx::replay
