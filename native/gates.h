// Gates of convolutions: they choose, for each image, what is read and what is computed.
#pragma once

#include <chrono>
#include <memory>

#include "steps.h"

namespace thrifty {

// What is left of a convolution. The lists and marks lie in the context until the operator ends.
struct Choice {
    Channels read;                            // input channels
    Channels computed;                        // output channels
    const std::uint8_t* is_computed = nullptr;  // [output channels]; null: all are
    float* scale = nullptr;                   // [output channels], of those that are computed; null: 1
    bool by_column = false;                   // only `columns` of the input are read, else all
    const int* columns = nullptr;             // positions y * width + x, rising
    int column_count = 0;
};

class ConvGate : protected Access {
public:
    using Access::Access;
    virtual ~ConvGate() = default;

    virtual Needs needs() const = 0;

    // Narrows a choice that holds everything that is active.
    virtual void decide(const Call& call, Choice& choice) const = 0;
};

// Null where the convolution has none.
std::unique_ptr<ConvGate> make_gate(const Program&, const Plan&, std::size_t place, const Kernels&);

// Writes the time from its making to its end into a trace, as the gate's.
class GateTimer {
public:
    explicit GateTimer(StepTrace* trace) : trace_(trace) {
        if (trace_) start_ = Clock::now();
    }
    ~GateTimer() {
        if (trace_) trace_->gate_ms = std::chrono::duration<double, std::milli>(Clock::now() - start_).count();
    }
    GateTimer(const GateTimer&) = delete;
    GateTimer& operator=(const GateTimer&) = delete;

private:
    using Clock = std::chrono::steady_clock;
    StepTrace* trace_;
    Clock::time_point start_;
};

}  // namespace thrifty
