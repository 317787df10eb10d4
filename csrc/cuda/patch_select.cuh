// Which tokens of a sample are kept: the num_keep smallest pairs of key and index, as one 64-bit word each. One block
// to a sample: the largest word that is kept is found digit by digit from histograms, a scan numbers the tokens in
// order of index, and the kept ones are sorted by word. Keys stay in shared memory where they fit and are drawn again
// elsewhere.
#pragma once
#include "cuda/patch_sort.cuh"
#include "cuda/platform.h"
#include "cuda/storage.cuh"
#include "philox.h"

namespace sslkernels {
namespace patch_mask {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kGroup = 4;  // neighbours that one thread looks at, as many as share a counter of Philox
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
constexpr uint32_t kCachedBytes = 8 << 10;  // of keys, beside the words that are sorted

// Memory of one call, on the device; rows are dense. A sample has `tokens` scores, and as many places and flags.
struct Selection {
  const int64_t* seed;
  const int64_t* sample_ids;  // or null: 0, 1, ...
  const float* scores;        // or null: drawn
  int64_t tokens, num_keep;
  bool ordered;
  int64_t* ids_keep;
  int64_t* ids_restore;
  bool* mask;

  // Where a sample begins in what has an element for each token, and in ids_keep.
  __host__ __device__ int64_t first_token(int64_t sample) const { return sample * tokens; }
  __host__ __device__ int64_t first_kept(int64_t sample) const { return sample * num_keep; }

  __host__ __device__ uint32_t groups() const { return static_cast<uint32_t>((tokens + kGroup - 1) / kGroup); }
  __host__ __device__ bool cached() const { return groups() <= kCachedBytes / 16; }
  // Words in shared memory: all that are kept, a chunk of them, or none where their order does not matter.
  __host__ __device__ uint32_t words() const {
    return ordered ? 0 : static_cast<uint32_t>(num_keep < kSortChunk ? num_keep : kSortChunk);
  }
  __host__ __device__ bool fits() const { return num_keep <= kSortChunk; }
  __host__ __device__ size_t words_bytes() const { return (words() * sizeof(uint64_t) + 15) / 16 * 16; }
  size_t shared_bytes() const { return words_bytes() + (cached() ? groups() * size_t{16} : 0); }
};

// ---- keys

// In the order of the scores: -0 is 0, and NaN comes last.
__device__ __forceinline__ uint32_t key_of(float score) {
  if (score != score) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(score == 0 ? 0.f : score);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// The keys of one sample, four neighbours at a time.
class Keys {
 public:
  __device__ __forceinline__ Keys(const Selection& s, int64_t sample, uint4* cache)
      : scores_(s.scores ? s.scores + s.first_token(sample) : nullptr),
        cache_(cache),
        tokens_(static_cast<uint32_t>(s.tokens)),
        groups_(s.groups()) {
    if (!scores_) {
      seed_ = static_cast<uint64_t>(*s.seed);
      sample_ = static_cast<uint64_t>(s.sample_ids ? s.sample_ids[sample] : sample);
    }
    // each thread looks only at what it has stored itself: no barrier
    if (cache_)
      for (uint32_t group = threadIdx.x; group < groups_; group += blockDim.x) cache_[group] = fresh(group);
  }

  // Calls step(token, word) for a group's tokens.
  template <class Step>
  __device__ __forceinline__ void each_of(uint32_t group, const Step& step) const {
    const uint4 drawn = cache_ ? cache_[group] : fresh(group);
    const uint32_t keys[kGroup] = {drawn.x, drawn.y, drawn.z, drawn.w};
#pragma unroll
    for (int i = 0; i < kGroup; i++) {
      const uint32_t token = group * kGroup + i;
      if (token < tokens_) step(token, uint64_t{keys[i]} << 32 | token);
    }
  }
  template <class Step>
  __device__ __forceinline__ void each(const Step& step) const {
    for (uint32_t group = threadIdx.x; group < groups_; group += blockDim.x) each_of(group, step);
  }

 private:
  __device__ __forceinline__ uint4 fresh(uint32_t group) const {
    uint32_t keys[kGroup] = {group, static_cast<uint32_t>(sample_), static_cast<uint32_t>(sample_ >> 32),
                             kPhiloxPatchMask};
    if (!scores_) {
      philox(keys, seed_, PhiloxScalar{});
    } else {
      const float* const at = scores_ + int64_t{group} * kGroup;
#pragma unroll
      for (int i = 0; i < kGroup; i++) keys[i] = group * kGroup + i < tokens_ ? key_of(at[i]) : 0;
    }
    return make_uint4(keys[0], keys[1], keys[2], keys[3]);
  }

  const float* scores_;
  uint4* cache_;
  uint32_t tokens_, groups_;
  uint64_t seed_ = 0, sample_ = 0;
};

// ---- the largest word that is kept

// The digit of the word that has this rank, counted from 1; its rank among the words that have the digit, and their
// number.
struct Digit {
  uint32_t digit, rank, count;
};

// By one warp.
__device__ __forceinline__ void find_digit(const uint32_t* histogram, uint32_t rank, Digit* found) {
  constexpr int kBins = kDigits / 32;
  const uint32_t lane = threadIdx.x;
  uint32_t sum = 0;
  for (uint32_t i = 0; i < kBins; i++) sum += histogram[lane * kBins + i];
  uint32_t upto = sum;
  for (uint32_t delta = 1; delta < 32; delta *= 2) {
    const uint32_t lower = __shfl_up_sync(kAllLanes, upto, delta);
    if (lane >= delta) upto += lower;
  }
  uint32_t before = upto - sum;
  if (before >= rank || rank > upto) return;  // it lies in another lane's bins
  uint32_t digit = lane * kBins;
  for (; before + histogram[digit] < rank; digit++) before += histogram[digit];
  *found = {digit, rank - before, histogram[digit]};
}

// A word w such that `rank` >= 1 words are at most w.
__device__ __forceinline__ uint64_t find_limit(const Keys& keys, uint32_t rank, uint32_t tokens) {
  SSLK_SHARED(uint32_t, histogram, [kDigits]);
  SSLK_SHARED(Digit, found);
  uint64_t prefix = 0;
  for (int shift = 64 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    if (shift < 32 && (tokens - 1) >> shift == 0) continue;  // a digit of the index that is 0 in all
    for (uint32_t bin = threadIdx.x; bin < kDigits; bin += blockDim.x) histogram[bin] = 0;
    __syncthreads();
    const int above = shift + kDigitBits;
    keys.each([&](uint32_t, uint64_t word) {
      if (above == 64 || (word ^ prefix) >> above == 0)
        atomicAdd(&histogram[static_cast<uint32_t>(word >> shift) % kDigits], 1u);
    });
    __syncthreads();
    if (threadIdx.x < 32) find_digit(histogram, rank, &found);
    __syncthreads();
    prefix |= uint64_t{found.digit} << shift;
    rank = found.rank;
    if (rank == found.count) return prefix | ((uint64_t{1} << shift) - 1);  // all that begin so are kept
  }
  return prefix;
}

// ---- numbers in order of index

// Numbers flagged tokens in order of index, a group to a thread and all threads of the block at once.
class Numbering {
 public:
  // The flagged tokens before this thread's, in this call and all calls before it.
  __device__ __forceinline__ uint32_t before(uint32_t flags) {
    SSLK_SHARED(uint32_t, of_warp, [2][kMaxWarps]);  // by turns, so that one barrier is enough
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    uint32_t before = done_, total = 0;
#pragma unroll
    for (int i = 0; i < kGroup; i++) {
      const uint32_t ballot = __ballot_sync(kAllLanes, flags >> i & 1);
      before += __popc(ballot & ((1u << lane) - 1));
      total += __popc(ballot);
    }
    if (lane == 0) of_warp[turn_][warp] = total;
    __syncthreads();
    for (uint32_t w = 0; w < warps; w++) {
      const uint32_t count = of_warp[turn_][w];
      if (w < warp) before += count;
      done_ += count;
    }
    turn_ ^= 1;
    return before;
  }

 private:
  uint32_t done_ = 0;
  int turn_ = 0;
};

// Places and flags of a group's tokens, of which `kept` has a bit for each, `before` tokens being kept before them. The
// places of those that are kept are right where they are in order.
__device__ __forceinline__ void store_group(const Selection& s, int64_t sample, uint32_t group, uint32_t kept,
                                            uint32_t before) {
  const int64_t first = int64_t{group} * kGroup;
  int64_t* const places = s.ids_restore + s.first_token(sample) + first;
  bool* const mask = s.mask + s.first_token(sample) + first;
  alignas(16) int64_t place[kGroup];
  uint32_t flags = 0;
#pragma unroll
  for (int i = 0; i < kGroup; i++) {
    const bool is_kept = kept >> i & 1;
    place[i] = is_kept ? before : s.num_keep + first + i - before;
    before += is_kept;
    flags |= static_cast<uint32_t>(!is_kept) << 8 * i;
  }
  if (first + kGroup <= s.tokens && aligned(places) && reinterpret_cast<uintptr_t>(mask) % 4 == 0) {
    store16(places, *reinterpret_cast<const uint4*>(place));
    store16(places + 2, *reinterpret_cast<const uint4*>(place + 2));
    *reinterpret_cast<uint32_t*>(mask) = flags;
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; i++)
    if (first + i < s.tokens) {
      places[i] = place[i];
      mask[i] = !(kept >> i & 1);
    }
}

// ---- kernels

// Dynamic shared memory: words(), then the keys of all groups where cached().
__global__ void __launch_bounds__(kMaxThreads) patch_select_kernel(const Selection s) {
  SSLK_DYNAMIC_SHARED(unsigned char, shared);
  auto* const chunk = reinterpret_cast<uint64_t*>(shared);
  const int64_t sample = blockIdx.x;
  int64_t* const ids_keep = s.ids_keep + s.first_kept(sample);
  int64_t* const ids_restore = s.ids_restore + s.first_token(sample);
  const uint32_t num_keep = static_cast<uint32_t>(s.num_keep), groups = s.groups();
  // the result's memory holds the words where shared memory does not
  uint64_t* const words = s.fits() ? chunk : reinterpret_cast<uint64_t*>(ids_keep);
  const Keys keys(s, sample, s.cached() ? reinterpret_cast<uint4*>(shared + s.words_bytes()) : nullptr);
  const uint64_t limit = num_keep ? find_limit(keys, num_keep, static_cast<uint32_t>(s.tokens)) : 0;
  Numbering numbering;
  for (uint32_t first = 0; first < groups; first += blockDim.x) {
    const uint32_t group = first + threadIdx.x;
    uint32_t kept = 0;
    if (group < groups && num_keep)
      keys.each_of(group, [&](uint32_t token, uint64_t word) { kept |= (word <= limit) << token % kGroup; });
    uint32_t before = numbering.before(kept);
    if (group >= groups) continue;
    store_group(s, sample, group, kept, before);
    if (kept)
      keys.each_of(group, [&](uint32_t token, uint64_t word) {
        if (!(kept >> token % kGroup & 1)) return;
        if (s.ordered)
          ids_keep[before++] = token;
        else
          words[before++] = word;
      });
  }
  if (s.ordered) return;
  __syncthreads();
  if (s.fits())
    sort_shared(words, num_keep);
  else
    sort_global(words, num_keep, chunk);
  __syncthreads();
  for (uint32_t place = threadIdx.x; place < num_keep; place += blockDim.x) {
    const uint32_t token = static_cast<uint32_t>(words[place]);
    ids_keep[place] = token;
    ids_restore[token] = place;
  }
}

constexpr int64_t kNowhere = INT64_MAX;

// places[v]: the first i such that values[i] = v, or kNowhere. What is not in [0, size) is left out. Ends in a barrier.
__device__ __forceinline__ void find_places(const int64_t* values, int64_t count, int64_t* places, int64_t size) {
  for (int64_t v = threadIdx.x; v < size; v += blockDim.x) places[v] = kNowhere;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x)
    if (values[i] >= 0 && values[i] < size)
      atomicMin(reinterpret_cast<unsigned long long*>(places + values[i]), static_cast<unsigned long long>(i));
  __syncthreads();
}

// The places and flags of all tokens, given ids_keep.
__global__ void __launch_bounds__(kMaxThreads) patch_invert_kernel(const Selection s) {
  const int64_t sample = blockIdx.x;
  int64_t* const ids_restore = s.ids_restore + s.first_token(sample);
  find_places(s.ids_keep + s.first_kept(sample), s.num_keep, ids_restore, s.tokens);
  Numbering numbering;
  const uint32_t groups = s.groups();
  for (uint32_t first = 0; first < groups; first += blockDim.x) {
    const int64_t group = first + threadIdx.x, token = group * kGroup;
    int64_t places[kGroup];
    uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < kGroup; i++) {
      places[i] = token + i < s.tokens ? ids_restore[token + i] : kNowhere;
      kept |= (places[i] != kNowhere) << i;
    }
    const uint32_t before = numbering.before(kept);
    if (group >= groups) continue;
    store_group(s, sample, static_cast<uint32_t>(group), kept, before);
#pragma unroll
    for (int i = 0; i < kGroup; i++)
      if (kept >> i & 1) ids_restore[token + i] = places[i];
  }
}

// Where ids_restore (samples, tokens) has each of the values below num_keep; (samples, num_keep).
__global__ void __launch_bounds__(kMaxThreads)
    patch_places_kernel(const int64_t* ids_restore, int64_t tokens, int64_t* places, int64_t num_keep) {
  const int64_t sample = blockIdx.x;
  find_places(ids_restore + sample * tokens, tokens, places + sample * num_keep, num_keep);
}

// The ids of each sample sorted, with their positions: words of id and position, those of ids not in [0, size) last.
// Dynamic shared memory: as many words as fit.
__global__ void __launch_bounds__(kMaxThreads)
    patch_lists_kernel(const int64_t* ids, int64_t count, int64_t size, uint64_t* lists) {
  SSLK_DYNAMIC_SHARED(uint64_t, chunk);
  const int64_t sample = blockIdx.x;
  uint64_t* const of_sample = lists + sample * count;
  uint64_t* const words = count <= kSortChunk ? chunk : of_sample;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    const int64_t id = ids[sample * count + i];
    words[i] = static_cast<uint64_t>(id >= 0 && id < size ? id : 0xffffffff) << 32 | static_cast<uint64_t>(i);
  }
  __syncthreads();
  if (count > kSortChunk) return sort_global(words, static_cast<uint32_t>(count), chunk);
  sort_shared(words, static_cast<uint32_t>(count));
  __syncthreads();
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) of_sample[i] = words[i];
}

// ---- launches

// Whole warps, enough for `work` of the threads at once.
inline unsigned threads_for(int64_t work) {
  return static_cast<unsigned>(work >= kMaxThreads ? kMaxThreads : work <= 64 ? 64 : (work + 31) / 32 * 32);
}

// The threads that look at a sample's tokens and sort the kept.
inline unsigned select_threads(const Selection& s) {
  const int64_t pairs = (s.words() + 1) / 2;
  return threads_for(s.groups() > pairs ? s.groups() : pairs);
}

inline void launch_select(const Selection& s, int64_t samples, cudaStream_t stream) {
  SSLK_LAUNCH(patch_select_kernel, static_cast<unsigned>(samples), select_threads(s), s.shared_bytes(), stream, s);
}

inline void launch_invert(const Selection& s, int64_t samples, cudaStream_t stream) {
  SSLK_LAUNCH(patch_invert_kernel, static_cast<unsigned>(samples), threads_for(s.groups()), 0, stream, s);
}

}  // namespace patch_mask
}  // namespace sslkernels
