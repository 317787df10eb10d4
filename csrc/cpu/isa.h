// The instruction sets that the kernels are compiled for, and the one in use.
#pragma once
#include <string>
#include <vector>

#include "contrast.h"
#include "ema.h"
#include "infonce.h"
#include "patch_loss.h"
#include "patch_mask.h"
#include "unit_rows.h"

namespace sslkernels {

// Work done by a number of iterations, in flops or exps, for the caller to time.
struct Peak {
  double (*multiply_add)(bool bf16, int64_t iterations);
  double (*exp)(int64_t iterations);
};

struct Isa {
  const char* name;
  NtXentKernel (*nt_xent)(bool bf16);
  ContrastKernel (*contrast)(bool bf16);
  EmaKernel (*ema)();
  PatchLossKernel (*patch_loss)();
  PatchMaskKernel (*patch_mask)();
  UnitRowsKernel (*unit_rows)();
  Peak (*peak)();
  bool (*supported)();
  // Whether it is worth choosing where it runs; null: always.
  bool (*fast)() = nullptr;
};

// What was built, from the baseline up.
const std::vector<Isa>& built_isas();

// The fastest one that this processor has, or what SSLKERNELS_ISA asks for; throws std::runtime_error, naming the
// choices, where that cannot run. Read once.
const Isa& isa();

// What multiplies so many rows of float32: AMX leaves a few of them, or short ones, to the vector units, since packing
// takes longer than multiplying then; but not where SSLKERNELS_ISA asks for it.
const Isa& isa_for(int64_t rows, int64_t dim);

}  // namespace sslkernels
