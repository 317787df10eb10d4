// The Python module is compiled with UBSan's checks of alignment and of array bounds but without its runtime: these are
// the handlers that the checks call. A violation in a kernel is then an exception with file and line.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "block.h"

namespace {

struct Location {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] void fail(const std::string& what, const Location& at) {
  if (cuda_on_cpu::current_thread) {
    cuda_on_cpu::current_block->fail(what, {at.file, static_cast<int>(at.line)});
  }
  std::fprintf(stderr, "%s:%u: %s\n", at.file, at.line, what.c_str());
  std::abort();
}

}  // namespace

struct TypeMismatch {
  Location at;
  const void* type;
  unsigned char log_alignment, kind;
};
struct OutOfBounds {
  Location at;
};

extern "C" [[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(TypeMismatch* mismatch, uintptr_t pointer) {
  const int alignment = 1 << mismatch->log_alignment;
  fail(pointer ? "misaligned access: the address is no multiple of " + std::to_string(alignment) : "null pointer",
       mismatch->at);
}
extern "C" [[noreturn]] void __ubsan_handle_out_of_bounds_abort(OutOfBounds* violation, uintptr_t index) {
  fail("index " + std::to_string(static_cast<intptr_t>(index)) + " is out of bounds", violation->at);
}
