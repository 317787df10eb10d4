// Masks of rectangles, as in BEiT and DINOv2: see mask_sets.h for who runs this.
#pragma once
#include "mask_sets.h"

namespace sslkernels {
namespace masks {

constexpr int kMaxAspects = 128;
constexpr uint32_t kPatience = 10;  // attempts in a row that add nothing before the rest is masked at random

struct BlockMaskJob {
  uint32_t height, width, min_patches, max_patches, attempts;
  uint32_t aspects;                   // how many there are
  uint32_t factors[2 * kMaxAspects];  // each aspect, height to width, and its inverse, in units of 2^-16
};

// A side of a rectangle: sqrt(area * factor) rounded to nearest, for an area in units of 2^-8.
SSLK_TEAM uint32_t side_of(uint32_t area, uint32_t factor) {
  const uint32_t four_squares = static_cast<uint32_t>(uint64_t{area} * factor >> 22);
  return (integer_sqrt(four_squares) + 1) / 2;
}

// Masks exactly `wanted` patches, wanted <= height * width.
template <class Team>
SSLK_TEAM void block_mask(const Team& team, const BlockMaskJob& job, const Draws& draws, uint32_t wanted,
                          const Scratch& scratch, bool* mask) {
  const uint32_t patches = job.height * job.width;
  uint32_t* const set = scratch.sets[0];
  clear(team, set, patches);
  uint32_t masked = 0, failures = 0;
  for (uint32_t attempt = 0; attempt < job.attempts && masked < wanted && failures < kPatience; attempt++) {
    const uint32_t limit = least(wanted - masked, job.max_patches);
    const uint32_t low = least(job.min_patches, limit), high = job.min_patches + limit - low;
    uint32_t w[4];
    draws.words(attempt, w);
    const uint32_t area = 256 * low + below(256 * (high - low) + 1, w[0]), aspect = below(job.aspects, w[1]);
    const uint32_t height = side_of(area, job.factors[2 * aspect]), width = side_of(area, job.factors[2 * aspect + 1]);
    uint32_t added = 0;
    if (height && width && height <= job.height && width <= job.width) {
      const Rectangle r{below(job.height - height + 1, w[2]), below(job.width - width + 1, w[3]), height, width};
      added = height * width - count_in(team, set, job.width, r);
      if (added > limit) added = 0;
      if (added) add_rectangle(team, set, job.width, r);
    }
    masked += added;
    failures = added ? 0 : failures + 1;
  }
  if (masked < wanted) {
    const auto is_free = [set](uint32_t token) { return ~set[token / 32] >> token % 32; };
    choose(team, draws, patches, is_free, patches - masked, wanted - masked, scratch);
    team.sync();
    for (uint32_t i = team.lane(); i < wanted - masked; i += team.lanes()) {
      const uint32_t token = static_cast<uint32_t>(scratch.order[i]);
      team.add(set + token / 32, 1u << token % 32);
    }
    team.sync();
  }
  write_mask(team, set, patches, mask);
}

}  // namespace masks
}  // namespace sslkernels
