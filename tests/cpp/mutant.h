// Included before the kernels of a mutated build: which mutation is in force, and what mutations are made of.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace mutant {

// The number in SSLKERNELS_MUTANT; 0, or nothing, leaves the kernels as they are.
static const int kChosen = std::getenv("SSLKERNELS_MUTANT") ? std::atoi(std::getenv("SSLKERNELS_MUTANT")) : 0;

// A number, or each of a vector, rounded to bfloat16.
template <class T>
T bf16(T x) {
  if constexpr (std::is_arithmetic_v<T>) {
    const float narrow = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    float rounded;
    std::memcpy(&rounded, &bits, 4);
    return static_cast<T>(rounded);
  } else {
    for (unsigned i = 0; i < sizeof x / sizeof x[0]; i++) x[i] = bf16(+x[i]);
    return x;
  }
}

}  // namespace mutant
