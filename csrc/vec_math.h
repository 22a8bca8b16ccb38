// e^x, ln x and ln(a/b) without branches or calls, so that a loop over them becomes SIMD of whatever width
// PHYX_MULTIVERSION compiles it for. The polynomials have the least relative error on the reduced range (found by
// Lawson's iteration).
#pragma once
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace phyx {

PHYX_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

PHYX_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// e^x for -87 <= x <= 88, relative error below 1.1e-7; NaN passes through.
// e^x = 2^k e^f with k = round(x / ln 2) and |f| <= ln(2)/2.
PHYX_INLINE float normal_exp(float x) {
  constexpr float round = 12582912.0f;  // 1.5·2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504f + round, k = shifted - round;
  const float f = (x - k * 0.693145752f) - k * 1.42860677e-6f;  // ln 2 in two parts, the first exact times k
  float p = 0.0013814467f;
  p = p * f + 0.008368781f;
  p = p * f + 0.041668393f;
  p = p * f + 0.1666652f;
  p = p * f + 0.49999994f;
  p = p * f * f + f + 1.0f;
  return p * float_of((bits_of(shifted) + 127) << 23);  // times the float with exponent k
}

// e^x for x <= 88; 0 below -87, where the normal floats end.
PHYX_INLINE float vec_exp(float x) { return x < -87.0f ? 0.0f : normal_exp(x); }

// ln x for positive normal x, relative error below 1.1e-7; infinity and NaN pass through.
// ln x = k ln 2 + ln(1 + f) with 1 + f in [1/√2, √2], ln(1 + f) = f - f²/2 + f³ p(f).
PHYX_INLINE float vec_log(float x) {
  constexpr uint32_t root_half = 0x3f3504f3;  // the bits of 1/√2
  const int32_t exponent = static_cast<int32_t>(bits_of(x) - root_half) >> 23;
  const float k = static_cast<float>(exponent);
  const float f = float_of(bits_of(x) - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  float p = 0.08700438f;
  p = p * f - 0.14267492f;
  p = p * f + 0.14914769f;
  p = p * f - 0.16577584f;
  p = p * f + 0.19963063f;
  p = p * f - 0.25001338f;
  p = p * f + 0.3333391f;
  const float tail = f * f * (p * f - 0.5f) + k * 1.42860677e-6f;
  const float value = k * 0.693145752f + (f + tail);
  return x < float_of(0x7f800000) ? value : x;
}

// ln(a/b) for positive normal a and b to some units of the last place, exactly 0 for a == b; NaN in b passes through.
// With a' = a 2^-k near b it is k ln 2 + 2 artanh s, s = (a' - b)/(a' + b), |s| <= 0.2; artanh by least relative error.
PHYX_INLINE float log_ratio(float a, float b) {
  // The bits of a positive float are its binary logarithm to within 0.09, scaled by 2^23.
  const int32_t k = static_cast<int32_t>(bits_of(a) - bits_of(b) + (1u << 22)) >> 23;
  a = float_of(bits_of(a) - (static_cast<uint32_t>(k) << 23));
  const float s = (a - b) / (a + b), t = s * s;
  float p = 0.3036844f;
  p = p * t + 0.39957473f;
  p = p * t + 0.6666695f;
  p = p * t + 2.0f;
  return static_cast<float>(k) * 0.693147181f + s * p;
}

}  // namespace phyx
