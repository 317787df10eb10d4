// Visits every unordered pair of row groups once, so that in each round a group belongs to one worker alone.
//
// Round 0 plays each group against itself; then a round-robin tournament (the circle method) pairs them all up. Sums
// into a group's rows need no atomics and no private copies, and since each group meets its partners in a fixed order,
// the result does not depend on the number of threads. Rounds are not separated by barriers: workers take games in
// order, and a game starts once both groups have finished the round before. The games taken earlier are all under way,
// so this also ends when one worker plays alone.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace sslkernels {

class Tournament {
 public:
  explicit Tournament(int64_t groups)
      : groups_(groups), seats_(groups + groups % 2), rounds_done_(new std::atomic<int64_t>[seats_]) {
    for (int64_t g = 0; g < seats_; g++) rounds_done_[g].store(0, std::memory_order_relaxed);
  }

  // One worker's share; play(a, b) gets a <= b. Call it from as many threads as there are.
  template <class Play>
  void work(const Play& play) {
    for (;;) {
      const int64_t game = next_.fetch_add(1, std::memory_order_relaxed);
      if (game >= groups_ + (seats_ - 1) * (seats_ / 2)) return;
      if (game < groups_) {
        play(game, game);
        rounds_done_[game].store(1, std::memory_order_release);
        continue;
      }
      const int64_t round = (game - groups_) / (seats_ / 2), seat = (game - groups_) % (seats_ / 2);
      const int64_t fixed = seats_ - 1;
      const int64_t x = seat == 0 ? fixed : (round + seat) % fixed;
      const int64_t y = seat == 0 ? round : (round - seat + fixed) % fixed;
      const int64_t a = x < y ? x : y, b = x < y ? y : x;
      await(a, round + 1);
      if (b < groups_) {  // with an odd number of groups one seat is empty, and its opponent rests
        await(b, round + 1);
        play(a, b);
        rounds_done_[b].store(round + 2, std::memory_order_release);
      }
      rounds_done_[a].store(round + 2, std::memory_order_release);
    }
  }

 private:
  void await(int64_t group, int64_t rounds) const {
    for (int spins = 0; rounds_done_[group].load(std::memory_order_acquire) < rounds; spins++)
      if (spins > 1000) std::this_thread::yield();
  }

  int64_t groups_, seats_;
  std::unique_ptr<std::atomic<int64_t>[]> rounds_done_;
  std::atomic<int64_t> next_{0};
};

// Visits every pair of a row group and a column group once, so that at any time a group belongs to one worker alone. In
// each round all groups of the shorter side meet another of the longer side; a group meets its partners in a fixed
// order. Workers take games in order, as in Tournament.
class LatinSquare {
 public:
  LatinSquare(int64_t rows, int64_t columns)
      : tall_(rows > columns),
        short_(tall_ ? columns : rows),
        long_(tall_ ? rows : columns),
        done_(new std::atomic<int64_t>[short_ + long_]) {
    for (int64_t g = 0; g < short_ + long_; g++) done_[g].store(0, std::memory_order_relaxed);
  }

  // One worker's share of play(row group, column group). Call it from as many threads as there are.
  template <class Play>
  void work(const Play& play) {
    for (;;) {
      const int64_t game = next_.fetch_add(1, std::memory_order_relaxed);
      if (game >= short_ * long_) return;
      const int64_t round = game / short_, seat = game % short_, partner = (seat + round) % long_;
      await(seat, round);
      await(short_ + partner, games_before(partner, round));
      if (tall_)
        play(partner, seat);
      else
        play(seat, partner);
      done_[seat].fetch_add(1, std::memory_order_release);
      done_[short_ + partner].fetch_add(1, std::memory_order_release);
    }
  }

 private:
  // Rounds before `round` in which a group of the longer side plays: those with (group - round) mod long < short.
  int64_t games_before(int64_t group, int64_t round) const {
    const auto overlap = [round](int64_t begin, int64_t end) {
      end = end < round ? end : round;
      return end > begin ? end - begin : 0;
    };
    const int64_t first = group - short_ + 1, wrapped = group + long_ - short_ + 1;
    return overlap(first > 0 ? first : 0, group + 1) + overlap(wrapped > group + 1 ? wrapped : group + 1, long_);
  }

  void await(int64_t group, int64_t games) const {
    for (int spins = 0; done_[group].load(std::memory_order_acquire) < games; spins++)
      if (spins > 1000) std::this_thread::yield();
  }

  bool tall_;
  int64_t short_, long_;
  std::unique_ptr<std::atomic<int64_t>[]> done_;
  std::atomic<int64_t> next_{0};
};

// Tiles along the side of a group: several, so that a row tile stays in cache while columns pass by; few enough that
// many threads find a group each.
inline int64_t tiles_in_group(int64_t tiles) { return tiles >= 256 ? 8 : tiles >= 64 ? 4 : tiles >= 32 ? 2 : 1; }

}  // namespace sslkernels
