// Context and target blocks, as in I-JEPA: see mask_sets.h for who runs this.
#pragma once
#include "mask_sets.h"

namespace sslkernels {
namespace masks {

constexpr uint32_t kContextAttempts = 20;

struct MultiBlockJob {
  uint32_t height, width, target_height, target_width, context_height, context_width, targets, min_context;
  bool allow_overlap;
};

// What one sample gets.
struct MultiBlockRow {
  int64_t* context_ids;  // as many as the context's block has patches: those that are there, at random, then repeats
  int64_t* context_count;
  int64_t* target_ids;  // of all targets
  bool* context_mask;
  bool* target_mask;  // of all targets
};

// The row of sample i, given that of the first one.
SSLK_TEAM MultiBlockRow row_of(const MultiBlockJob& job, const MultiBlockRow& first, int64_t i) {
  const int64_t patches = int64_t{job.height} * job.width;
  return {first.context_ids + i * job.context_height * job.context_width, first.context_count + i,
          first.target_ids + i * job.targets * job.target_height * job.target_width, first.context_mask + i * patches,
          first.target_mask + i * job.targets * patches};
}

SSLK_TEAM Rectangle place(const Draws& draws, uint32_t draw, const MultiBlockJob& job, uint32_t height,
                          uint32_t width) {
  uint32_t w[4];
  draws.words(draw, w);
  return {below(job.height - height + 1, w[0]), below(job.width - width + 1, w[1]), height, width};
}

template <class Team>
SSLK_TEAM void write_targets(const Team& team, const MultiBlockJob& job, const Draws& draws, const Scratch& scratch,
                             const MultiBlockRow& row) {
  const uint32_t patches = job.height * job.width, area = job.target_height * job.target_width;
  for (uint32_t target = 0; target < job.targets; target++) {
    const Rectangle r = place(draws, target, job, job.target_height, job.target_width);
    for (uint32_t i = team.lane(); i < area; i += team.lanes())
      row.target_ids[uint64_t{target} * area + i] = (r.top + i / r.width) * job.width + r.left + i % r.width;
    clear(team, scratch.sets[1], patches);
    add_rectangle(team, scratch.sets[1], job.width, r);
    write_mask(team, scratch.sets[1], patches, row.target_mask + uint64_t{target} * patches);
    if (!job.allow_overlap) add_rectangle(team, scratch.sets[0], job.width, r);
  }
}

// The first of a few blocks that leaves min_context patches beside the targets, or else the one that leaves most.
template <class Team>
SSLK_TEAM Rectangle place_context(const Team& team, const MultiBlockJob& job, const Draws& draws,
                                  const uint32_t* targets) {
  const uint32_t area = job.context_height * job.context_width;
  Rectangle best{};
  uint32_t most = 0;
  for (uint32_t attempt = 0; attempt < kContextAttempts; attempt++) {
    const Rectangle r = place(draws, job.targets + attempt, job, job.context_height, job.context_width);
    const uint32_t left = area - count_in(team, targets, job.width, r);
    if (attempt == 0 || left > most) best = r, most = left;
    if (left >= job.min_context) break;
  }
  return best;
}

template <class Team>
SSLK_TEAM void multi_block_mask(const Team& team, const MultiBlockJob& job, const Draws& draws, const Scratch& scratch,
                                const MultiBlockRow& row) {
  const uint32_t patches = job.height * job.width;
  uint32_t *const targets = scratch.sets[0], *const context = scratch.sets[1];
  clear(team, targets, patches);
  write_targets(team, job, draws, scratch, row);
  const Rectangle block = place_context(team, job, draws, targets);
  clear(team, context, patches);
  add_rectangle(team, context, job.width, block);
  for (uint32_t word = team.lane(); word < words_of(patches); word += team.lanes()) context[word] &= ~targets[word];
  team.sync();
  write_mask(team, context, patches, row.context_mask);

  const auto is_context = [context](uint32_t token) { return context[token / 32] >> token % 32; };
  const uint32_t count = keyed(team, draws, patches, is_context, ~0u, scratch);
  team.sync();
  team.sort(scratch.order, count);
  if (team.lane() == 0) *row.context_count = count;
  for (uint32_t i = team.lane(); i < job.context_height * job.context_width; i += team.lanes())
    row.context_ids[i] = count ? static_cast<uint32_t>(scratch.order[i < count ? i : 0]) : 0;
}

}  // namespace masks
}  // namespace sslkernels
