#include <cstdint>

#include "simple.h"

namespace thrifty::generic {

#include "activate.inl"
#include "simple.inl"

}  // namespace thrifty::generic
