#include "replay/checksum.h"

#include <algorithm>
#include <cstring>

namespace phyx::replay {
namespace {

std::uint64_t rotate(std::uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }

template <typename Word>
std::uint64_t read(const unsigned char* data) {
  Word word;
  std::memcpy(&word, data, sizeof word);
  return word;
}

}  // namespace

void Checksum::stripe(const unsigned char* data) {
  for (int i = 0; i < 4; ++i) lane_[i] = rotate(lane_[i] + read<std::uint64_t>(data + 8 * i) * kPrime2, 31) * kPrime1;
}

void Checksum::update(const void* data, std::size_t bytes) {
  if (bytes == 0) return;
  auto* next = static_cast<const unsigned char*>(data);
  if (const std::size_t held = total_ % kStripe; held > 0) {
    const std::size_t take = std::min(bytes, kStripe - held);
    std::memcpy(rest_ + held, next, take);
    total_ += take, next += take, bytes -= take;
    if (held + take < kStripe) return;
    stripe(rest_);
  }
  total_ += bytes;
  for (; bytes >= kStripe; next += kStripe, bytes -= kStripe) stripe(next);
  if (bytes > 0) std::memcpy(rest_, next, bytes);
}

std::uint64_t Checksum::value() const {
  std::uint64_t hash = kPrime5;
  if (total_ >= kStripe) {
    hash = rotate(lane_[0], 1) + rotate(lane_[1], 7) + rotate(lane_[2], 12) + rotate(lane_[3], 18);
    for (const std::uint64_t lane : lane_) hash = (hash ^ (rotate(lane * kPrime2, 31) * kPrime1)) * kPrime1 + kPrime4;
  }
  hash += total_;
  const unsigned char* next = rest_;
  std::size_t bytes = total_ % kStripe;
  for (; bytes >= 8; next += 8, bytes -= 8)
    hash = rotate(hash ^ (rotate(read<std::uint64_t>(next) * kPrime2, 31) * kPrime1), 27) * kPrime1 + kPrime4;
  if (bytes >= 4) {
    hash = rotate(hash ^ (read<std::uint32_t>(next) * kPrime1), 23) * kPrime2 + kPrime3;
    next += 4, bytes -= 4;
  }
  for (; bytes > 0; ++next, --bytes) hash = rotate(hash ^ (*next * kPrime5), 11) * kPrime1;
  hash = (hash ^ (hash >> 33)) * kPrime2;
  hash = (hash ^ (hash >> 29)) * kPrime3;
  return hash ^ (hash >> 32);
}

}  // namespace phyx::replay
