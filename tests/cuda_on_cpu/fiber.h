// A stack of its own for every CUDA thread, and the switch between stacks, of which the sanitizers are told.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
#define CUDA_ON_CPU_UCONTEXT  // slower, since it saves the signal mask too, but known to every processor
#endif
#if defined(CUDA_ON_CPU_UCONTEXT)
#include <ucontext.h>
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_ON_CPU_ASAN
#endif
#if __has_feature(thread_sanitizer)
#define CUDA_ON_CPU_TSAN
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define CUDA_ON_CPU_ASAN
#endif
#if defined(__SANITIZE_THREAD__)
#define CUDA_ON_CPU_TSAN
#endif
#if defined(CUDA_ON_CPU_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(CUDA_ON_CPU_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_ignore_thread_begin();  // exported, though no header declares them
extern "C" void __tsan_ignore_thread_end();
#endif

namespace cuda_on_cpu {

// While one lives, what this thread does is the harness's own business: ThreadSanitizer looks away.
struct Unwatched {
#if defined(CUDA_ON_CPU_TSAN)
  Unwatched() { __tsan_ignore_thread_begin(); }
  ~Unwatched() { __tsan_ignore_thread_end(); }
#else
  Unwatched() {}
#endif
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

// What ThreadSanitizer knows of the order of threads is what is published at an address and observed there later.
inline void publish([[maybe_unused]] void* at) {
#if defined(CUDA_ON_CPU_TSAN)
  __tsan_release(at);
#endif
}
inline void observe([[maybe_unused]] void* at) {
#if defined(CUDA_ON_CPU_TSAN)
  __tsan_acquire(at);
#endif
}

// A stack that can be left and resumed.
struct Context {
#if defined(CUDA_ON_CPU_UCONTEXT)
  ucontext_t registers;
#else
  void* stack_pointer = nullptr;
#endif
  const void* stack = nullptr;  // lowest address; AddressSanitizer wants to know where it is being led
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // of AddressSanitizer, while this stack is left
  void* tsan_fiber = nullptr;
};

#if !defined(CUDA_ON_CPU_UCONTEXT)
// Pushes what the ABI wants kept, stores the stack pointer, takes the other one, pops.
__attribute__((naked, noinline)) inline void swap_stacks(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
      "movq %rsp, (%rdi); movq %rsi, %rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
#endif

// Not instrumented: between the announcement and the switch itself we belong to neither thread.
__attribute__((noinline, no_sanitize("thread"))) inline void switch_stack(Context& from, Context& to,
                                                                          [[maybe_unused]] bool for_good) {
#if defined(CUDA_ON_CPU_TSAN)
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(CUDA_ON_CPU_UCONTEXT)
  swapcontext(&from.registers, &to.registers);
#else
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#endif
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// A stack with a function waiting on it. Its pages are mapped when touched, the lowest never: running out of stack
// crashes instead of writing into a neighbour. It is there for as long as the process lives.
class Fiber : public Context {
 public:
  Fiber() {
    const size_t page = sysconf(_SC_PAGESIZE);
    void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE);
    stack = static_cast<char*>(memory) + page;
    stack_bytes = kStackBytes;
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next switch to this fiber calls entry(), which must not return. What a former run left on the stack is gone.
  void prepare(void (*entry)()) {
#if defined(CUDA_ON_CPU_TSAN)
    if (!tsan_fiber) tsan_fiber = __tsan_create_fiber(0);
#endif
#if defined(CUDA_ON_CPU_ASAN)
    __asan_unpoison_memory_region(stack, stack_bytes);
    fake_stack = nullptr;
#endif
#if defined(CUDA_ON_CPU_UCONTEXT)
    getcontext(&registers);
    registers.uc_stack.ss_sp = const_cast<void*>(stack);
    registers.uc_stack.ss_size = stack_bytes;
    registers.uc_link = nullptr;
    makecontext(&registers, entry, 0);
#else
    void** top = reinterpret_cast<void**>(static_cast<char*>(const_cast<void*>(stack)) + stack_bytes) - 2;
    *--top = nullptr;  // where entry() would return to; it also ends a debugger's walk
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    stack_pointer = top;
#endif
  }

  // It has been left in the middle of a function and will not be resumed. What it did is published at `clock`.
  __attribute__((noinline, no_sanitize("thread"))) void abandon([[maybe_unused]] void* clock) {
#if defined(CUDA_ON_CPU_TSAN)
    void* me = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_fiber, __tsan_switch_to_fiber_no_sync);
    __tsan_release(clock);
    __tsan_switch_to_fiber(me, __tsan_switch_to_fiber_no_sync);
    tsan_fiber = nullptr;  // not destroyed: ThreadSanitizer would ask why it still looks away
#endif
  }

 private:
  static constexpr size_t kStackBytes = 256 << 10;
};

// First thing on a fiber's stack. `left` is where we came from; AddressSanitizer alone knows the host's stack.
inline void arrived_on_new_stack([[maybe_unused]] Context* left) {
#if defined(CUDA_ON_CPU_ASAN)
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (left) left->stack = stack, left->stack_bytes = bytes;
#endif
}

}  // namespace cuda_on_cpu
