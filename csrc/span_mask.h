// Masks of spans in time, as in wav2vec 2.0: see mask_sets.h for who runs this.
#pragma once
#include "mask_sets.h"

namespace sslkernels {
namespace masks {

struct SpanMaskJob {
  uint32_t tokens, span_length, min_spans;
  uint64_t share;  // of a sample's tokens that its spans would cover if none overlapped, in units of 2^-32
  bool overlap;
};

// How many spans a sample of this length has room for.
SSLK_TEAM uint32_t span_room(const SpanMaskJob& job, uint32_t length) {
  if (length < job.span_length) return 0;
  return job.overlap ? length - job.span_length + 1 : length / job.span_length;
}

// Up or down at random, so that the mean is the share of the tokens.
SSLK_TEAM uint32_t drawn_spans(const SpanMaskJob& job, const Draws& draws, uint32_t length) {
  uint32_t w[4];
  draws.words(0, w);
  const uint64_t spans = (length * job.share + uint64_t{w[0]} * job.span_length) / (uint64_t{job.span_length} << 32);
  return spans > job.min_spans ? static_cast<uint32_t>(spans) : job.min_spans;
}

// `asked` spans, or those that are drawn where it is negative, but no more than there is room for.
template <class Team>
SSLK_TEAM void span_mask(const Team& team, const SpanMaskJob& job, const Draws& draws, uint32_t length, int64_t asked,
                         const Scratch& scratch, bool* mask) {
  uint32_t *const slots = scratch.sets[0], *const set = scratch.sets[1];
  clear(team, slots, job.tokens);
  clear(team, set, job.tokens);
  const uint32_t room = span_room(job, length);
  const uint32_t spans = asked < 0      ? least(room, drawn_spans(job, draws, length))
                         : asked < room ? static_cast<uint32_t>(asked)
                                        : room;
  // Without overlap: shrunk to one token each, spans are any tokens of a shorter sample, each equally often.
  const uint32_t growth = job.overlap ? 0 : job.span_length - 1;
  if (spans) {
    const uint32_t places = job.overlap ? room : length - spans * growth;
    const auto is_place = [places](uint32_t token) {
      return token >= places ? 0u : places - token >= 4 ? 15u : (1u << (places - token)) - 1;
    };
    choose(team, draws, job.tokens, is_place, places, spans, scratch);
    team.sync();
    for (uint32_t i = team.lane(); i < spans; i += team.lanes()) {
      const uint32_t slot = static_cast<uint32_t>(scratch.order[i]);
      team.add(slots + slot / 32, 1u << slot % 32);
    }
    team.sync();
  }
  uint32_t before = 0;  // spans that begin in earlier words
  for (uint32_t word = 0; word < words_of(job.tokens); word++) {
    const uint32_t bits = slots[word];
    if (!bits) continue;
    for (uint32_t bit = team.lane(); bit < 32; bit += team.lanes())
      if (bits >> bit & 1) {
        const uint32_t start = 32 * word + bit + growth * (before + count_bits(bits & ((1u << bit) - 1)));
        for_words(start, start + job.span_length, [&](uint32_t at, uint32_t covered) { team.add(set + at, covered); });
      }
    before += count_bits(bits);
  }
  team.sync();
  write_mask(team, set, job.tokens, mask);
}

}  // namespace masks
}  // namespace sslkernels
