// Every CPU kernel, compiled for this instruction set.
#define SSLK_ISA avx512
#include "../contrast_kernel.h"
#include "../ema_kernel.h"
#include "../infonce_kernel.h"
#include "../patch_loss_kernel.h"
#include "../patch_mask_kernel.h"
#include "../peak.h"
#include "../unit_rows_kernel.h"
