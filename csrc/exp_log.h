// The exponential and the logarithm of float32 as plain arithmetic, which every compiler vectorises.
#pragma once
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace phyx {

// e^-u for |u| <= 87, where neither it nor its inverse leaves the normal floats; relative error below 1.5e-7.
// e^t = 2^k e^f with k = round(t / ln 2); e^f by the polynomial of degree 6 of least relative error on ±ln(2)/2.
PHYX_INLINE float exp_of_minus(float u) {
  constexpr float round = 12582912.0f;  // 1.5·2^23: adding it leaves the nearest integer in the low bits
  const float shifted = u * -1.44269504f + round, k = shifted - round;
  const float f = (-u - k * 0.693145752f) - k * 1.42860677e-6f;  // ln 2 in two parts, the first exact times k
  float p = 0.00138368458f;
  p = p * f + 0.00837481581f;
  p = p * f + 0.0416682251f;
  p = p * f + 0.166664198f;
  p = p * f + 0.499999911f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;  // the exponent field of 2^k
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// ln(a/b) for positive normal a and b to some units of the last place, exactly 0 for a == b; NaN in b passes through.
// With a' = a 2^-k near b it is k ln 2 + 2 artanh s, s = (a' - b)/(a' + b), |s| <= 0.2; artanh by least relative error.
PHYX_INLINE float log_ratio(float a, float b) {
  uint32_t a_bits, b_bits;
  std::memcpy(&a_bits, &a, sizeof a_bits);
  std::memcpy(&b_bits, &b, sizeof b_bits);
  // The bits of a positive float are its binary logarithm to within 0.09, scaled by 2^23.
  const int32_t k = static_cast<int32_t>(a_bits - b_bits + (1u << 22)) >> 23;
  a_bits -= static_cast<uint32_t>(k) << 23;
  std::memcpy(&a, &a_bits, sizeof a);
  const float s = (a - b) / (a + b), t = s * s;
  float p = 0.3036844f;
  p = p * t + 0.39957473f;
  p = p * t + 0.6666695f;
  p = p * t + 2.0f;
  return static_cast<float>(k) * 0.693147181f + s * p;
}

}  // namespace phyx
