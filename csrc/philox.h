// Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011): the one definition, for single
// words and for vectors of them, on the host and on a GPU.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define SSLK_PHILOX __host__ __device__ __forceinline__
#define SSLK_PHILOX_UNROLL
#else
#define SSLK_PHILOX inline __attribute__((always_inline))
#define SSLK_PHILOX_UNROLL _Pragma("GCC unroll 10")
#endif

namespace sslkernels {

// The last word of a counter: no two ops draw the same numbers.
enum PhiloxStream : uint32_t {
  kPhiloxEma = 1,
  kPhiloxPatchMask = 2,
  kPhiloxBlockMask = 3,
  kPhiloxMultiBlockMask = 4,
  kPhiloxSpanMask = 5,
};

// The products of 32-bit words with a constant, in halves.
struct PhiloxScalar {
  SSLK_PHILOX void operator()(uint32_t a, uint32_t constant, uint32_t& high, uint32_t& low) const {
    const uint64_t product = uint64_t{a} * constant;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
};

// Replaces a counter of four words by four random words.
template <class Word, class Multiply>
SSLK_PHILOX void philox(Word (&c)[4], uint64_t key, const Multiply& multiply) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  SSLK_PHILOX_UNROLL for (int round = 0; round < 10; round++) {
    Word high0, low0, high1, low1;
    multiply(c[0], 0xD2511F53u, high0, low0);
    multiply(c[2], 0xCD9E8D57u, high1, low1);
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace sslkernels
