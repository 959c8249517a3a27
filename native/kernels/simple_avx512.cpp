#include <cstdint>

#include "simple.h"

namespace thrifty::avx512 {

#include "activate.inl"
#include "simple.inl"

}  // namespace thrifty::avx512
