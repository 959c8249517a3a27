// Runs a program on images, on threads of its own.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "context.h"
#include "plan.h"
#include "program.h"
#include "steps.h"
#include "threads.h"

namespace thrifty {

// Images [N, C, H, W] in any layout; steps count elements.
struct Images {
    const void* data = nullptr;
    bool bytes = false;  // uint8, else float32
    std::int64_t count = 0;
    std::int64_t image = 0, channel = 0, row = 0, column = 0;  // steps
};

// How bytes become numbers: byte * scale[c] + shift[c].
struct Normalisation {
    std::vector<float> scale, shift;
};

struct OperatorTrace {
    double ms = 0, gate_ms = 0;                 // over all images
    std::vector<std::int64_t> macs, gate_macs;  // per image; macs without the gate's
    const char* kernel = "";
    std::array<int, axes> marks{};              // by Axis, as `decided` says
    // [images, marks] by Axis.
    std::array<std::vector<std::uint8_t>, axes> decisions;
};

struct Trace {
    double ms = 0;  // over all images, everything included
    std::vector<OperatorTrace> operators;
};

// Decisions [images, marks of the axis] that replace a gate's own, per operator; null: the gate decides.
using Forced = std::vector<Marks>;

// Settings of gates, by the operator's place and the setting's name in programs.
struct Change {
    std::int64_t place;
    std::string name;
    double value;
};
using Changes = std::vector<Change>;

// Several threads may call one engine at the same time: the first has the pool, others work alone meanwhile. The bits
// of an answer depend on the image, the decisions and the instruction set only.
class Engine {
public:
    // The tensors of `source` must outlive the engine. Throws std::invalid_argument for anything that is wrong.
    Engine(const Source& source, const Limits& limits, int threads, Normalisation normalisation);
    ~Engine();
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    // `out`: [N, C, H, W] of the program's output, contiguous. A trace is taken image by image, all threads on each.
    // `changes`: of settings, for this call alone. Throws std::invalid_argument where they don't fit.
    void run(const Images& images, float* out, const Forced& forced = {}, Trace* trace = nullptr, const Changes& changes = {});

    // Changes settings for calls that begin after, which see all of the changes. Throws std::invalid_argument where one
    // doesn't fit, and then makes none.
    void set(const Changes& changes);
    // Of every operator, as they stand together.
    std::vector<GateSettings> settings();

    // Overwrites the memory that activations lie in while no call runs: whatever a call reads, it must have written.
    void fill_memory(float value);

    const Program& program() const { return program_; }
    int threads() const { return threads_; }
    const char* isa() const { return kernels_.isa; }
    std::size_t arena_bytes() const { return plan_.arena * sizeof(float); }
    bool normalises() const { return !normalisation_.scale.empty(); }

    static constexpr int max_threads = 256;

private:
    struct State;   // what a fork leaves unusable
    class Lease;    // a context, or the pool, for the time of a call

    State& state();
    void apply(const Changes& changes, std::vector<GateSettings>& settings) const;
    void one(const Images& images, std::int64_t image, float* out, Context& context, Team& team, const Forced& forced,
             Trace* trace) const;
    // Runs an operator where its guard lets it.
    void step(std::size_t place, const Call& call) const;
    void read_input(const Images& images, std::int64_t image, Context& context, Team& team) const;
    void write_output(float* out, const Context& context, Team& team) const;

    const Kernels& kernels_;
    int threads_;
    Program program_;
    Plan plan_;
    Normalisation normalisation_;
    std::vector<std::unique_ptr<Step>> steps_;
    Needs needs_;
    std::vector<GateSettings> settings_;  // the state's mutex guards them
    std::atomic<State*> state_{nullptr};
};

}  // namespace thrifty
