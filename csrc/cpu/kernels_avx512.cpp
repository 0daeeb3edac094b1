#include "loops/table.h"

RF_DEFINE_KERNELS(avx512)
