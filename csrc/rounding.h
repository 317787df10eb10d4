// Stochastic rounding to 16 bits, one definition for the host and a GPU: of the two neighbours of x, with 16 random
// bits, one whose mean is x. Infinities and NaN are kept.
#pragma once
#include <cstdint>
#include <cstring>

#include "philox.h"

namespace sslkernels {

SSLK_PHILOX uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

SSLK_PHILOX uint16_t stochastic_bf16(float x, uint32_t random) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffff;
  const uint32_t rounded = magnitude >= 0x7f800000 ? bits : bits + random;
  return magnitude > 0x7f800000 ? 0x7fc0 : static_cast<uint16_t>(rounded >> 16);
}

SSLK_PHILOX uint16_t stochastic_fp16(float x, uint32_t random) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffff;
  const bool is_small = magnitude < 0x38800000;
  // below the normal numbers the distance of neighbours is 2^-24 throughout
  const float units = (x < 0 ? -x : x) * (is_small ? 0x1p40f : 0.f);
  const uint32_t small = (static_cast<uint32_t>(static_cast<int32_t>(is_small ? units : 0.f)) + random) >> 16;
  const uint32_t normal = (magnitude - (112u << 23) + (random >> 3)) >> 13;
  const uint32_t finite = is_small ? small : normal < 0x7c00 ? normal : 0x7c00;
  const uint32_t rounded = magnitude > 0x7f800000 ? 0x7e00 : magnitude == 0x7f800000 ? 0x7c00 : finite;
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | rounded);
}

}  // namespace sslkernels
