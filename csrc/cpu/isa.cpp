#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace sslkernels {

#define SSLK_DECLARE(isa)                    \
  namespace isa {                            \
  NtXentKernel nt_xent_kernel(bool bf16);    \
  ContrastKernel contrast_kernel(bool bf16); \
  EmaKernel ema_kernel();                    \
  PatchMaskKernel patch_mask_kernel();       \
  Peak peak();                               \
  }
SSLK_DECLARE(baseline)
SSLK_DECLARE(avx2)
SSLK_DECLARE(avx512)
SSLK_DECLARE(avx512_bf16)
#undef SSLK_DECLARE

namespace {

std::vector<Isa> list() {
  std::vector<Isa> isas = {{"baseline", baseline::nt_xent_kernel, baseline::contrast_kernel, baseline::ema_kernel,
                            baseline::patch_mask_kernel, baseline::peak, [] { return true; }}};
#ifdef SSLKERNELS_HAVE_AVX2
  isas.push_back({"avx2", avx2::nt_xent_kernel, avx2::contrast_kernel, avx2::ema_kernel, avx2::patch_mask_kernel,
                  avx2::peak, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }});
#endif
#ifdef SSLKERNELS_HAVE_AVX512
  isas.push_back({"avx512", avx512::nt_xent_kernel, avx512::contrast_kernel, avx512::ema_kernel,
                  avx512::patch_mask_kernel, avx512::peak, [] {
                    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                           __builtin_cpu_supports("fma");
                  }});
#endif
#ifdef SSLKERNELS_HAVE_AVX512_BF16
  isas.push_back({"avx512_bf16", avx512_bf16::nt_xent_kernel, avx512_bf16::contrast_kernel, avx512_bf16::ema_kernel,
                  avx512_bf16::patch_mask_kernel, avx512_bf16::peak, [] {
                    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
                  }});
#endif
  return isas;
}

const Isa* choose() {
  const char* wanted = std::getenv("SSLKERNELS_ISA");
  const Isa* best = nullptr;
  std::string runnable;
  for (const Isa& isa : built_isas()) {
    if (!isa.supported()) continue;
    best = &isa;
    runnable += std::string(runnable.empty() ? "" : ", ") + isa.name;
    if (wanted && std::string(wanted) == isa.name) return best;
  }
  if (wanted && *wanted)
    throw std::runtime_error("SSLKERNELS_ISA must be one of " + runnable + " on this machine, got '" + wanted + "'");
  return best;
}

}  // namespace

const std::vector<Isa>& built_isas() {
  static const std::vector<Isa> isas = list();
  return isas;
}

const Isa& isa() {
  static const Isa* const chosen = choose();
  return *chosen;
}

}  // namespace sslkernels
