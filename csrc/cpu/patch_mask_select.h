// Which tokens stay: the smallest keys of each sample, and what follows from them. No torch, no instruction set.
#pragma once
#include <cstring>
#include <vector>

#include "patch_mask_share.h"

namespace sslkernels {

struct MaskJob {
  int64_t samples, tokens, kept;
  bool ordered;
  uint64_t seed;
  const int64_t* sample_ids;  // null: 0, 1, ...
  const float* scores;        // in place of random keys, or null

  // ---- results: (samples, kept), (samples, tokens) and (samples, tokens)
  int64_t *ids_keep, *ids_restore;
  bool* mask;
};

// An integer in the order of scores: zeros of both signs are equal, and so are all NaN, the largest.
inline uint32_t score_key(float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0xffffffff;
  return bits >> 31 ? 0x80000000 - magnitude : 0x80000000 + magnitude;
}

// Selects the tokens of one sample after the other, on one thread. A key and the token's index are one number of 64
// bits, so that no two are equal.
class Selection {
 public:
  Selection(const MaskJob& job, const PatchMaskKernel& kernel)
      : job_(job), kernel_(kernel), keys_(job.tokens + kKeyBlock), kept_(job.kept + 1) {}

  void run(int64_t sample) {
    find_keys(sample);
    const uint64_t last = job_.kept > 0 ? last_kept() : 0;
    int64_t* restore = job_.ids_restore + sample * job_.tokens;
    bool* mask = job_.mask + sample * job_.tokens;
    int64_t count = 0;
    for (int64_t t = 0; t < job_.tokens; t++) {
      const bool stays = job_.kept > 0 && number(t) <= last;
      mask[t] = !stays;
      restore[t] = stays ? count : job_.kept + t - count;
      kept_[count] = number(t);  // overwritten by the next one unless this one stays
      count += stays;
    }
    int64_t* keep = job_.ids_keep + sample * job_.kept;
    if (!job_.ordered) sort_kept();
    for (int64_t k = 0; k < job_.kept; k++) keep[k] = token(kept_[k]);
    for (int64_t k = 0; !job_.ordered && k < job_.kept; k++) restore[keep[k]] = k;
  }

 private:
  uint64_t number(int64_t t) const { return uint64_t{keys_[t]} << 32 | static_cast<uint64_t>(t); }
  static int64_t token(uint64_t number) { return static_cast<int64_t>(number & 0xffffffff); }

  void find_keys(int64_t sample) {
    if (job_.scores) {
      const float* scores = job_.scores + sample * job_.tokens;
      for (int64_t t = 0; t < job_.tokens; t++) keys_[t] = score_key(scores[t]);
    } else {
      const int64_t id = job_.sample_ids ? job_.sample_ids[sample] : sample;
      kernel_.keys(job_.seed, static_cast<uint64_t>(id), job_.tokens, keys_.data());
    }
  }

  // The largest number that stays. A histogram of the keys' leading bits leaves few to choose from.
  uint64_t last_kept() {
    const int bits = job_.tokens < 4096 ? 8 : 12;
    histogram_.assign(size_t{1} << bits, 0);
    for (int64_t t = 0; t < job_.tokens; t++) histogram_[keys_[t] >> (32 - bits)]++;
    int64_t rank = job_.kept - 1;  // of what is looked for, in its bucket at last
    uint32_t bucket = 0;
    for (; rank >= histogram_[bucket]; bucket++) rank -= histogram_[bucket];
    candidates_.clear();
    for (int64_t t = 0; t < job_.tokens; t++)
      if (keys_[t] >> (32 - bits) == bucket) candidates_.push_back(number(t));
    std::nth_element(candidates_.begin(), candidates_.begin() + rank, candidates_.end());
    return candidates_[rank];
  }

  // By key. They come in order of index, which a stable sort keeps among equals.
  void sort_kept() {
    if (job_.kept < kFewestForRadix) return std::sort(kept_.begin(), kept_.begin() + job_.kept);
    sorted_.resize(kept_.size());
    for (int shift = 32; shift < 64; shift += 8) {
      int64_t ends[256] = {};
      for (int64_t k = 0; k < job_.kept; k++) ends[kept_[k] >> shift & 255]++;
      for (int digit = 1; digit < 256; digit++) ends[digit] += ends[digit - 1];
      for (int64_t k = job_.kept - 1; k >= 0; k--) sorted_[--ends[kept_[k] >> shift & 255]] = kept_[k];
      kept_.swap(sorted_);
    }
  }

  static constexpr int64_t kFewestForRadix = 128;

  const MaskJob& job_;
  const PatchMaskKernel& kernel_;
  std::vector<uint32_t> keys_;
  std::vector<uint64_t> kept_, candidates_, sorted_;
  std::vector<int64_t> histogram_;
};

template <class Parallel>
void draw_masks(const MaskJob& job, const Workers<Parallel>& workers) {
  workers.share(job.samples, std::max<int64_t>(1, 4096 / (job.tokens + 1)), [&] {
    return [&job, selection = Selection(job, workers.kernel)](int64_t begin, int64_t end) mutable {
      for (int64_t n = begin; n < end; n++) selection.run(n);
    };
  });
}

// ids_restore and mask of a sample's ids_keep; false where an id is out of range or comes twice.
inline bool invert_mask(const MaskJob& job, int64_t sample) {
  const int64_t* keep = job.ids_keep + sample * job.kept;
  int64_t* restore = job.ids_restore + sample * job.tokens;
  bool* mask = job.mask + sample * job.tokens;
  std::fill(mask, mask + job.tokens, true);
  for (int64_t k = 0; k < job.kept; k++) {
    if (keep[k] < 0 || keep[k] >= job.tokens || !mask[keep[k]]) return false;
    mask[keep[k]] = false;
    restore[keep[k]] = k;
  }
  int64_t removed = 0;
  for (int64_t t = 0; t < job.tokens; t++)
    if (mask[t]) restore[t] = job.kept + removed++;
  return true;
}

// The same of all samples. Returns the first row that has an id out of range or twice, or -1.
template <class Parallel>
int64_t invert_masks(const MaskJob& job, const Workers<Parallel>& workers) {
  FirstRow bad;
  workers.share(job.samples, std::max<int64_t>(1, 4096 / (job.tokens + 1)), [&] {
    return [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++)
        if (!invert_mask(job, n)) bad.report(n);
    };
  });
  return bad.row();
}

}  // namespace sslkernels
