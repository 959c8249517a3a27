#include <cstdint>

#include "simple.h"

namespace thrifty::avx2 {

#include "activate.inl"
#include "simple.inl"

}  // namespace thrifty::avx2
