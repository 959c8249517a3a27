#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace thrifty {
namespace {

std::vector<Kernels> available() {
    std::vector<Kernels> found{
        {"generic", generic::make_convolution, &generic::simple_kernels(), generic::make_column_convolution}};
#ifdef THRIFTY_X86
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2)
        found.push_back({"avx2", avx2::make_convolution, &avx2::simple_kernels(), avx2::make_column_convolution});
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
        found.push_back(
            {"avx512", avx512::make_convolution, &avx512::simple_kernels(), avx512::make_column_convolution});
#endif
    return found;
}

Kernels choose() {
    const char* forced = std::getenv("THRIFTY_ISA");
    const std::string wanted = forced ? forced : "";
    const auto found = available();
    if (wanted.empty()) return found.back();
    std::string names;
    for (const Kernels& kernels : found) {
        if (wanted == kernels.isa) return kernels;
        names += std::string(names.empty() ? "" : ", ") + kernels.isa;
    }
    throw std::runtime_error("THRIFTY_ISA is '" + wanted + "', but this CPU and this build of thrifty can run: " + names +
                             ". Unset it to have the best of them.");
}

}  // namespace

std::vector<const char*> available_isas() {
    std::vector<const char*> names;
    for (const Kernels& kernels : available()) names.push_back(kernels.isa);
    return names;
}

const Kernels& kernels() {
    static const Kernels chosen = choose();
    return chosen;
}

}  // namespace thrifty
