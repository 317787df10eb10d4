// Every CPU kernel, compiled for this instruction set.
#define SSLK_ISA baseline
#include "../infonce_kernel.h"
#include "../peak.h"
