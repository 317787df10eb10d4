// The kernels that multiply bf16, with AMX; isa.cpp takes all others from avx512.
#define SSLK_ISA amx
#include "../contrast_kernel.h"
#include "../infonce_kernel.h"
#include "../peak.h"
