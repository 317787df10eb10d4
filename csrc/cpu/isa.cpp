#include "isa.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>

namespace sslkernels {

#define SSLK_DECLARE(isa)                    \
  namespace isa {                            \
  NtXentKernel nt_xent_kernel(bool bf16);    \
  ContrastKernel contrast_kernel(bool bf16); \
  EmaKernel ema_kernel();                    \
  PatchLossKernel patch_loss_kernel();       \
  PatchMaskKernel patch_mask_kernel();       \
  UnitRowsKernel unit_rows_kernel();         \
  Peak peak();                               \
  }
SSLK_DECLARE(baseline)
SSLK_DECLARE(avx2)
SSLK_DECLARE(avx512)
SSLK_DECLARE(avx512_bf16)
SSLK_DECLARE(amx)
#undef SSLK_DECLARE

namespace {

#define SSLK_KERNELS(isa)                                                                                           \
  #isa, isa::nt_xent_kernel, isa::contrast_kernel, isa::ema_kernel, isa::patch_loss_kernel, isa::patch_mask_kernel, \
      isa::unit_rows_kernel, isa::peak

#ifdef SSLKERNELS_HAVE_AMX
// Asks the system for the tile registers, which it keeps for processes that want them.
bool may_use_tiles() {
#ifdef SYS_arch_prctl
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<Isa> list() {
  std::vector<Isa> isas = {{SSLK_KERNELS(baseline), [] { return true; }}};
#ifdef SSLKERNELS_HAVE_AVX2
  isas.push_back({SSLK_KERNELS(avx2), [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }});
#endif
#ifdef SSLKERNELS_HAVE_AVX512
  isas.push_back({SSLK_KERNELS(avx512), [] {
                    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                           __builtin_cpu_supports("fma");
                  }});
#endif
#ifdef SSLKERNELS_HAVE_AVX512_BF16
  isas.push_back({SSLK_KERNELS(avx512_bf16),
                  [] {
                    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
                  },
                  // Intel's multiply bf16 at half the rate of fp32, and leave the speed to AMX
                  [] { return !__builtin_cpu_is("intel"); }});
#endif
#if defined(SSLKERNELS_HAVE_AMX) && defined(SSLKERNELS_HAVE_AVX512)
  isas.push_back({"amx", amx::nt_xent_kernel, amx::contrast_kernel, avx512::ema_kernel, avx512::patch_loss_kernel,
                  avx512::patch_mask_kernel, avx512::unit_rows_kernel, amx::peak, [] {
                    return __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bf16") &&
                           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && may_use_tiles();
                  }});
#endif
  return isas;
}
#undef SSLK_KERNELS

// The name in SSLKERNELS_ISA, or null.
const char* wanted_isa() {
  const char* name = std::getenv("SSLKERNELS_ISA");
  return name && *name ? name : nullptr;
}

const Isa* choose(const char* wanted) {
  const Isa* best = nullptr;
  std::string runnable;
  for (const Isa& isa : built_isas()) {
    if (!isa.supported()) continue;
    if (!isa.fast || isa.fast()) best = &isa;
    runnable += std::string(runnable.empty() ? "" : ", ") + isa.name;
    if (wanted && std::string(wanted) == isa.name) return &isa;
  }
  if (wanted)
    throw std::runtime_error("SSLKERNELS_ISA must be one of " + runnable + " on this machine, got '" + wanted + "'");
  return best;
}

}  // namespace

const std::vector<Isa>& built_isas() {
  static const std::vector<Isa> isas = list();
  return isas;
}

const Isa& isa() {
  static const Isa* const chosen = choose(wanted_isa());
  return *chosen;
}

const Isa& isa_for(int64_t rows, int64_t dim) {
  constexpr int64_t kFewRows = 512, kShort = 32;
  static const bool multiplies_parts = isa().name == std::string("amx") && !wanted_isa();
  static const Isa* const vectors = multiplies_parts ? choose("avx512") : &isa();
  return rows <= kFewRows || dim <= kShort ? *vectors : isa();
}

}  // namespace sslkernels
