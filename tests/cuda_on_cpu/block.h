// One block at a time: its threads are fibers, which run until they wait for one another.
#pragma once
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "schedule.h"
#include "shared_memory.h"
#include "types.h"

namespace cuda_on_cpu {

constexpr unsigned kWarpSize = 32, kMaxThreads = 1024;

// A place in the kernel's source. As a default argument, here() gives the place of the call.
struct Where {
  const char* file = nullptr;
  int line = 0;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
  bool operator!=(const Where& other) const {
    return line != other.line || (file != other.file && std::strcmp(file, other.file) != 0);
  }
};

// What a copy on the way holds: it was read when it was issued and is written when it is waited for.
struct AsyncCopy {
  void* to;
  unsigned char bytes[16];
};

struct Warp;

struct Thread : Fiber {
  uint3 index;
  unsigned lane;
  Warp* warp;
  bool done;
  Where waits_at;
  std::vector<std::vector<AsyncCopy>> copies;  // committed groups, and last the one that is being filled
};

// What a warp does together: combine(operands, mask), run by whoever comes last, with an operand from each lane.
using Combine = void (*)(void* const* operands, unsigned mask);

struct Meeting {
  unsigned mask, arrived = 0;
  Combine combine;
  Where where;
};

struct Warp {
  unsigned ready = 0;  // lanes that can run
  unsigned rotation = 0;
  unsigned meeting = 0;  // lanes of all masks that have begun to meet
  void* operands[kWarpSize];
  Meeting meetings[kWarpSize];  // by the lowest lane of the mask: masks that meet at the same time are disjoint
  char clock[kWarpSize][2];     // where __syncwarp publishes and observes, by turns
  unsigned turn[kWarpSize] = {};
};

struct LaunchShape {
  dim3 grid, block;
  size_t dynamic_bytes;
};

struct Kernel {
  void (*call)(const void* arguments);
  const void* arguments;
};

class Block;
inline Block* current_block = nullptr;
inline Thread* current_thread = nullptr;
inline char begin_clock, end_clock, fence_clock;  // see publish(): of the launch, and of all fences

class Block {
 public:
  Block(const LaunchShape& shape, uint3 index, const Schedule& schedule, const Kernel& kernel,
        std::vector<Thread*> threads)
      : shape(shape),
        index(index),
        memory(shape.dynamic_bytes),
        schedule_(schedule),
        random_(schedule.random(index.x + (uint64_t{index.y} << 20) + (uint64_t{index.z} << 40))),
        kernel_(kernel),
        count_(shape.block.x * shape.block.y * shape.block.z),
        running_(count_),
        warps_((count_ + kWarpSize - 1) / kWarpSize),
        threads_(std::move(threads)) {
    schedule.arrange(warp_order_, warps_.size(), random_);
    if (schedule.shuffled())
      for (Warp& warp : warps_) warp.rotation = random_.below(kWarpSize);
    for (unsigned i = 0; i < count_; i++) {
      Thread& thread = *threads_[i];
      thread.index = {i % shape.block.x, i / shape.block.x % shape.block.y, i / shape.block.x / shape.block.y};
      thread.lane = i % kWarpSize, thread.warp = &warps_[i / kWarpSize];
      thread.done = false, thread.waits_at = {};
      thread.copies.assign(1, {});
      thread.prepare(&Block::thread_main);
      set_ready(thread);
    }
  }

  // Runs the kernel in every thread; throws what a thread threw, or what the harness has found.
  void run() {
#if defined(CUDA_ON_CPU_TSAN)
    host_.tsan_fiber = __tsan_get_current_fiber();
#endif
    current_block = this;
    current_thread = choose(nullptr);
    switch_stack(host_, *current_thread, false);
    const std::string at = " (thread " + name(current_thread->index) + " of block " + name(index) + ")";
    current_block = nullptr;
    current_thread = nullptr;
    if (!error_ && failure_.empty()) return;
    for (Thread* thread : threads_) thread->abandon(&end_clock);
    if (error_) std::rethrow_exception(error_);
    throw std::runtime_error(failed_at_.text() + ": " + failure_ + at);
  }

  // __syncthreads, and the number of threads whose predicate holds.
  unsigned sync_threads(bool predicate, const Where& where) {
    const unsigned turn = barrier_turn_ % 2;
    publish(&barrier_clock_[turn]);  // by turns: who runs ahead to the next barrier must not be observed at this one
    wait_for_block(predicate, turn, where);
    observe(&barrier_clock_[turn]);
    Unwatched unwatched;
    return barrier_count_[turn];
  }

  // Meets the other lanes of the mask. What this orders is up to the caller: a shuffle promises nothing about memory.
  void meet(unsigned mask, void* operand, Combine combine, const Where& where) {
    Unwatched unwatched;
    Thread& me = *current_thread;
    Warp& warp = *me.warp;
    const unsigned bit = 1u << me.lane;
    if (!(mask & bit)) fail("the mask lacks the lane that calls", where);
    if (mask & ~lanes_of(warp)) fail("the mask has lanes that the block has not", where);
    Meeting& meeting = warp.meetings[__builtin_ctz(mask)];
    if (!meeting.arrived) {
      if (warp.meeting & mask) fail("lanes of one warp meet with masks that overlap but differ", where);
      warp.meeting |= mask;
      meeting.mask = mask, meeting.combine = combine, meeting.where = where;
    } else if (meeting.mask != mask) {
      fail("lanes of one warp meet with masks that overlap but differ", where);
    } else if (meeting.combine != combine || meeting.where != where) {
      fail("lanes of one mask meet in different places: " + meeting.where.text() + " and here", where);
    }
    warp.operands[me.lane] = operand;
    meeting.arrived |= bit;
    if (meeting.arrived != mask) return wait(where);
    if (combine) combine(warp.operands, mask);
    meeting.arrived = 0;
    warp.meeting &= ~mask;
    warp.turn[__builtin_ctz(mask)]++;
    warp.ready |= mask;
    idle_ = 0;
    hand_over(choose(&me));
  }

  // Lets others run, any of them: a thread that spins waits for one that is not next in the order.
  void yield(const Where& where) {
    Unwatched unwatched;
    Thread& me = *current_thread;
    if (++idle_ > kMaxIdle) fail("threads spin for ever", where);
    me.warp->ready &= ~(1u << me.lane);
    Thread* other = choose_at_random();
    set_ready(me);
    if (other) hand_over(other);
  }
  void maybe_yield(const Where& where) {
    Unwatched unwatched;
    if (schedule_.preempting() && random_.below(4) == 0) yield(where);
  }

  // Ends the block: the host gets the error, and no thread, nor this one, is resumed. It works where an exception
  // cannot pass, such as in a handler of UBSan.
  [[noreturn]] void fail(std::string what, const Where& where) {
    failure_ = std::move(what);  // and nothing that would have to be freed is left on this stack
    failed_at_ = where;
    switch_stack(*current_thread, host_, true);
    __builtin_unreachable();
  }

  const LaunchShape shape;
  const uint3 index;
  SharedMemory memory;

 private:
  static constexpr int64_t kMaxIdle = 1 << 24;

  static std::string name(uint3 v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
  }

  // Not instrumented: it never returns, and ThreadSanitizer would keep its frame from one run of the fiber to the next.
  __attribute__((no_sanitize("thread"))) static void thread_main() {
    arrived_on_new_stack(current_block->host_.stack ? nullptr : &current_block->host_);
    run_kernel();
    Context* me = current_thread;
    Context* next = current_block->leave();
    switch_stack(*me, *next, true);
  }

  __attribute__((noinline)) static void run_kernel() {
    observe(&begin_clock);
    try {
      current_block->kernel_.call(current_block->kernel_.arguments);
    } catch (...) {
      Unwatched unwatched;
      current_block->error_ = std::current_exception();
    }
    publish(&end_clock);
  }

  // The running thread is done: who goes on?
  Context* leave() {
    Unwatched unwatched;
    Thread& me = *current_thread;
    me.done = true;
    me.warp->ready &= ~(1u << me.lane);
    running_--;
    idle_ = 0;
    if (error_ || running_ == 0) return &host_;
    Thread* next = choose(&me);
    if (!next) {
      set_deadlock();
      return &host_;
    }
    current_thread = next;
    return next;
  }

  void wait_for_block(bool predicate, unsigned turn, const Where& where) {
    Unwatched unwatched;
    if (barrier_arrived_ == 0) {
      barrier_where_ = where;
      barrier_count_[turn] = 0;  // all have read the count that lies here: they have been to the barrier since
    } else if (barrier_where_ != where) {
      fail("threads of one block meet at different barriers: " + barrier_where_.text() + " and here", where);
    }
    barrier_count_[turn] += predicate;
    if (++barrier_arrived_ < count_) return wait(where);  // a thread that has left the kernel never arrives
    barrier_arrived_ = 0;
    barrier_turn_++;
    idle_ = 0;
    for (Warp& warp : warps_) warp.ready = lanes_of(warp);
    hand_over(choose(current_thread));
  }

  // Until another thread makes this one ready.
  void wait(const Where& where) {
    Thread& me = *current_thread;
    me.waits_at = where;
    me.warp->ready &= ~(1u << me.lane);
    Thread* next = choose(&me);
    if (!next) {
      set_deadlock();
      fail(std::move(failure_), failed_at_);
    }
    hand_over(next);
    me.waits_at = {};
  }

  void hand_over(Thread* next) {
    Thread* me = current_thread;
    if (next == me) return;
    current_thread = next;
    switch_stack(*me, *next, false);
  }

  Thread* choose(const Thread* running) {
    const Warp* warp = nullptr;
    if (schedule_.roaming()) return choose_at_random();
    if (running && running->warp->ready) warp = running->warp;
    for (size_t i = 0; !warp && i < warps_.size(); i++)
      if (warps_[warp_order_[i]].ready) warp = &warps_[warp_order_[i]];
    return warp ? lane_of(*warp, warp->rotation) : nullptr;
  }

  Thread* choose_at_random() {
    const uint32_t n = warps_.size(), first = random_.below(n), rotation = random_.below(kWarpSize);
    for (uint32_t i = 0; i < n; i++) {
      const Warp& warp = warps_[(first + i) % n];
      if (warp.ready) return lane_of(warp, rotation);
    }
    return nullptr;
  }

  // The first or last ready lane, counted from `rotation` on.
  Thread* lane_of(const Warp& warp, unsigned rotation) {
    const unsigned ready = rotation ? warp.ready >> rotation | warp.ready << (32 - rotation) : warp.ready;
    const unsigned lane = schedule_.descending() ? 31 - __builtin_clz(ready) : __builtin_ctz(ready);
    return threads_[(&warp - warps_.data()) * kWarpSize + (lane + rotation) % kWarpSize];
  }

  unsigned lanes_of(const Warp& warp) const {
    const unsigned first = static_cast<unsigned>(&warp - warps_.data()) * kWarpSize;
    return count_ - first >= kWarpSize ? ~0u : (1u << (count_ - first)) - 1;
  }

  void set_ready(Thread& thread) { thread.warp->ready |= 1u << thread.lane; }

  void set_deadlock() {
    std::map<std::string, std::pair<unsigned, const Thread*>> places;
    for (const Thread* thread : threads_) {
      if (thread->done) continue;
      failed_at_ = thread->waits_at;
      places.emplace(failed_at_.text(), std::make_pair(0u, thread)).first->second.first++;
    }
    failure_ = "deadlock:";
    for (const auto& [where, place] : places)
      failure_ += " " + std::to_string(place.first) + " threads wait at " + where + ", the first is " +
                  name(place.second->index) + ";";
    failure_ += " " + std::to_string(count_ - running_) + " of " + std::to_string(count_) + " have left the kernel";
  }

  const Schedule schedule_;
  Random random_;
  const Kernel kernel_;
  const unsigned count_;
  unsigned running_;
  std::vector<Warp> warps_;
  std::vector<Thread*> threads_;
  uint32_t warp_order_[kMaxThreads / kWarpSize];
  Context host_;
  std::exception_ptr error_;  // what a thread has thrown
  std::string failure_;       // what the harness has found
  Where failed_at_;
  int64_t idle_ = 0;  // yields since something else has happened

  unsigned barrier_arrived_ = 0, barrier_turn_ = 0, barrier_count_[2] = {};
  Where barrier_where_;
  char barrier_clock_[2];
};

}  // namespace cuda_on_cpu
