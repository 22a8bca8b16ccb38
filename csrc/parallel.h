// A few threads of our own: torch ships its OpenMP runtime, and a second one beside it would fight for the cores.
#pragma once
#include <algorithm>
#include <cstdint>

namespace phyx {

// Calls body(context, i) for every i in [0, items) on up to `threads` threads, the caller's included, and returns when
// all are done. Workers sleep between calls; one that wakes late finds nothing left to do and is not waited for. While
// another caller holds the pool, the work is done by the caller alone. `body` must not throw.
void run_parallel(int64_t items, int threads, void (*body)(void* context, int64_t i), void* context);

// Calls body(begin, end) for blocks of [0, size); `grain` is the length of a block.
template <typename Body>
void parallel_for(int64_t size, int64_t grain, int threads, Body&& body) {
  if (threads <= 1 || size <= grain) {
    body(int64_t{0}, size);
    return;
  }
  auto block = [&](int64_t i) { body(i * grain, std::min(size, (i + 1) * grain)); };
  run_parallel(
      (size + grain - 1) / grain, threads,
      [](void* context, int64_t i) { (*static_cast<decltype(block)*>(context))(i); }, &block);
}

}  // namespace phyx
