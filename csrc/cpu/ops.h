// The functions that bindings.cpp registers, one group for each op; what they compute is said in fastgan/ops/OP.py.
#pragma once

#include "op.h"

namespace fastgan {}  // namespace fastgan
