#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "columns.h"
#include "conv.h"

#define THRIFTY_ISA avx512
#define THRIFTY_VECTOR 16
#include "vec.h"

namespace thrifty::THRIFTY_ISA {

#include "activate.inl"
#include "conv_common.inl"
#include "conv_tile.inl"
#include "conv_direct.inl"
#include "conv_packed.inl"
#include "conv_dot.inl"
#include "conv_outer.inl"
#include "conv_winograd.inl"
#include "conv_sparse.inl"
#include "conv_depthwise.inl"
#include "conv.inl"
#include "conv_columns.inl"

}  // namespace thrifty::avx512
