#pragma once

#include "kernels.h"

namespace kvc {

// The table in use, or nullptr if KVCODEC_FORCE_ISA names one that is not there.
const Kernels* current_kernels();

}  // namespace kvc
