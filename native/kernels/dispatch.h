// The instruction set that all kernels run on, chosen once.
//
// A source file kernels/*_generic.cpp is compiled for the baseline of the machine, *_avx2.cpp for AVX2 with FMA and
// *_avx512.cpp for AVX-512; each includes the shared .inl inside its namespace. They must not instantiate inline
// functions of the standard library that another file uses too: the linker may keep the wide copy for everyone.
#pragma once

#include <vector>

#include "columns.h"
#include "conv.h"
#include "simple.h"

namespace thrifty {

struct Kernels {
    const char* isa;
    MakeConvolution make_convolution;
    const SimpleKernels* simple;
    MakeColumnConvolution make_column_convolution;
};

// The best that the CPU has, or what THRIFTY_ISA names. Throws std::runtime_error where that is unknown or cannot run
// here, at every call until it is set right.
const Kernels& kernels();

// What this CPU can run and this build has, the best last.
std::vector<const char*> available_isas();

}  // namespace thrifty
