// What one image needs while it goes through a program, kept from call to call.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "kernels/map.h"
#include "kernels/simple.h"
#include "plan.h"
#include "threads.h"

namespace thrifty {

// Floats at the start of a cache line, zeros at first.
class Floats {
public:
    explicit Floats(std::size_t count = 0)
        : data_(count ? static_cast<float*>(::operator new(count * sizeof(float), alignment)) : nullptr), count_(count) {
        std::fill_n(data_.get(), count, 0.0f);
    }
    float* data() { return data_.get(); }
    const float* data() const { return data_.get(); }
    std::size_t size() const { return count_; }

private:
    static constexpr std::align_val_t alignment{64};
    struct Free {
        void operator()(float* data) const { ::operator delete(data, alignment); }
    };
    std::unique_ptr<float[], Free> data_;
    std::size_t count_;
};

// The active channels of one buffer that may have inactive ones.
class Activity {
public:
    explicit Activity(int channels) : mask_(static_cast<std::size_t>(channels)), index_(static_cast<std::size_t>(channels)) {}

    const std::uint8_t* mask() const { return mask_.data(); }
    std::uint8_t* mask() { return mask_.data(); }
    Channels channels() const { return {index_.data(), count_}; }

    // After the mask has been written: makes the list of it.
    void list() {
        count_ = 0;
        for (std::size_t c = 0; c < mask_.size(); ++c) {
            index_[static_cast<std::size_t>(count_)] = static_cast<int>(c);
            count_ += mask_[c] != 0;
        }
    }

    void fill(bool active) {
        std::fill(mask_.begin(), mask_.end(), active);
        list();
    }

private:
    std::vector<std::uint8_t> mask_;
    std::vector<int> index_;
    int count_ = 0;
};

// Decisions of one operator, by Axis: `decided` marks each; null: none on that axis.
using Marks = std::array<const std::uint8_t*, axes>;

// One operator's share of a trace of one image.
struct StepTrace {
    double ms = 0, gate_ms = 0;
    std::int64_t macs = 0, gate_macs = 0;  // macs: without the gate's
    Marks decisions{};                     // of its gate, until the next operator runs
    const char* kernel = nullptr;          // where it depends on the call
};

// What a step needs of a context for itself, while it runs. A context has the largest of each over all steps.
struct Needs {
    std::size_t scratch = 0;   // floats of each thread
    std::size_t aside = 0;     // floats, shared by the threads
    std::size_t entries = 0;   // of lists of channels, features or positions

    void cover(const Needs& other) {
        scratch = std::max(scratch, other.scratch);
        aside = std::max(aside, other.aside);
        entries = std::max(entries, other.entries);
    }
    std::size_t bytes() const;
};

inline std::size_t Needs::bytes() const {
    return (scratch + aside) * sizeof(float) + entries * (sizeof(int) + sizeof(std::uint8_t) + sizeof(Run));
}

struct Context {
    Context(const Plan& plan, const Needs& needs);

    Floats arena, aside;
    Floats scratch;  // of a call without a pool, from the first of them on: a pool's workers have their own
    std::vector<Activity> activities;  // per buffer, of size 0 where it is not sparse
    std::vector<GateSettings> settings;  // per operator, as they stood when the call began
    std::vector<int> indices;
    std::vector<std::uint8_t> marks;
    std::vector<Run> runs;
};

// The threads that share the tasks of one operator.
class Team {
public:
    // `scratch[worker]` belongs to one worker alone. Without a pool the caller works alone.
    Team(Pool* pool, float* const* scratch) : pool_(pool), scratch_(scratch) {}

    int threads() const { return pool_ ? pool_->threads() : 1; }

    // Calls use(task, scratch) for each task, on any thread, and returns when all are done.
    template <class Use>
    void share(int tasks, const Use& use) {
        if (!pool_ || tasks == 1) {
            for (int task = 0; task < tasks; ++task) use(task, scratch_[0]);
            return;
        }
        struct Data {
            const Use& use;
            float* const* scratch;
            int first;
        } data{use, scratch_, 0};
        for (; data.first < tasks; data.first += Pool::max_tasks) {
            pool_->run(std::min(tasks - data.first, Pool::max_tasks), [](void* p, int task, int worker) noexcept {
                const Data& d = *static_cast<Data*>(p);
                d.use(d.first + task, d.scratch[worker]);
            }, &data);
        }
    }

    // Calls use(first, last, scratch) on neighbouring ranges of 0 .. count - 1, cut at multiples of `grain`. `cost` is
    // what one of them takes, about in floats read or written: little work is not shared.
    template <class Use>
    void share_range(int count, double cost, const Use& use, int grain = 1) {
        constexpr double worth = 8192;
        const int blocks = (count + grain - 1) / grain;
        const double pieces = std::min({threads() > 1 ? 4.0 * threads() : 1.0, count * cost / worth, double(blocks)});
        const int tasks = std::max(1, static_cast<int>(pieces));
        share(tasks, [&](int task, float* scratch) {
            const auto cut = [&](int t) {
                return std::min(count, static_cast<int>(static_cast<std::int64_t>(blocks) * t / tasks) * grain);
            };
            if (const int first = cut(task), last = cut(task + 1); first < last) use(first, last, scratch);
        });
    }

private:
    Pool* pool_;
    float* const* scratch_;
};

}  // namespace thrifty
