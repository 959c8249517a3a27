#include "executor.h"

#include <chrono>
#include <cstring>
#include <stdexcept>

namespace thrifty {
namespace {

using Clock = std::chrono::steady_clock;

double ms_since(Clock::time_point start) {
    return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

}  // namespace

struct Engine::State {
    explicit State(unsigned born) : generation(born) {}

    const unsigned generation;
    std::mutex mutex;
    std::vector<std::unique_ptr<Context>> contexts;  // that no call uses
    std::unique_ptr<Pool> pool;
    std::vector<Floats> scratch;  // of the pool's workers
    std::vector<float*> scratch_pointers;
    bool pool_taken = false;
};

class Engine::Lease {
public:
    // `images`: of the call, so many contexts at most are taken for the pool's workers.
    Lease(Engine& engine, std::int64_t images) : engine_(engine), state_(engine.state()) {
        const std::scoped_lock lock(state_.mutex);
        if (engine.threads_ > 1 && !state_.pool_taken) {
            if (!state_.pool) {
                while (state_.scratch.size() < static_cast<std::size_t>(engine.threads_)) {
                    state_.scratch.emplace_back(engine.needs_.scratch);
                    state_.scratch_pointers.push_back(state_.scratch.back().data());
                }
                state_.pool = std::make_unique<Pool>(engine.threads_);
            }
            state_.pool_taken = true;
            pool_ = state_.pool.get();
        }
        const std::int64_t wanted = pool_ && images >= engine.threads_ ? engine.threads_ : 1;
        try {
            contexts_.reserve(static_cast<std::size_t>(wanted));
            while (static_cast<std::int64_t>(contexts_.size()) < wanted) {
                if (state_.contexts.empty())
                    contexts_.push_back(std::make_unique<Context>(engine.plan_, engine.needs_));
                else {
                    contexts_.push_back(std::move(state_.contexts.back()));
                    state_.contexts.pop_back();
                }
                auto& winners = contexts_.back()->winners;
                winners.resize(engine.steps_.size());
                for (std::size_t i = 0; i < winners.size(); ++i) winners[i] = engine.winners_[i].load(std::memory_order_relaxed);
            }
            state_.contexts.reserve(state_.contexts.size() + contexts_.size());
        } catch (...) {
            if (pool_) state_.pool_taken = false;
            throw;
        }
    }

    ~Lease() {
        const std::scoped_lock lock(state_.mutex);
        for (auto& context : contexts_) state_.contexts.push_back(std::move(context));
        if (pool_) state_.pool_taken = false;
    }

    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

    Pool* pool() const { return pool_; }
    Context& context(int worker = 0) const { return *contexts_[static_cast<std::size_t>(worker)]; }
    float* const* scratch() const { return state_.scratch_pointers.data(); }

private:
    Engine& engine_;
    State& state_;
    Pool* pool_ = nullptr;
    std::vector<std::unique_ptr<Context>> contexts_;
};

Engine::Engine(const Source& source, const Limits& limits, int threads, Normalisation normalisation)
    : kernels_(kernels()), limits_(limits), threads_(threads), program_(validate(source, limits)),
      plan_(make_plan(program_, limits)), normalisation_(std::move(normalisation)),
      winners_(std::make_unique<std::atomic<int>[]>(program_.operators.size())) {
    if (threads < 1 || threads > max_threads)
        throw std::invalid_argument("threads is " + std::to_string(threads) + ", but must be in [1, " +
                                    std::to_string(max_threads) + "].");
    const auto channels = static_cast<std::size_t>(program_.buffers[0].channels);
    if (normalises() && (normalisation_.scale.size() != channels || normalisation_.shift.size() != channels))
        throw std::invalid_argument("the preprocessing is for " + std::to_string(normalisation_.scale.size()) +
                                    " channels, but the program's input has " + std::to_string(channels) + ".");
    for (std::size_t i = 0; i < program_.operators.size(); ++i) {
        steps_.push_back(make_step(program_, plan_, i, kernels_));
        needs_.cover(steps_.back()->needs());
        winners_[i].store(program_.operators[i].winners);
    }
    if (static_cast<std::int64_t>(needs_.scratch) > limits.memory / 4)
        throw std::invalid_argument("one operator works in " + std::to_string(needs_.scratch * 4) +
                                    " bytes, more than the limit of " + std::to_string(limits.memory) + ".");
    fork_generation();  // from here on forks are seen
}

Engine::~Engine() {
    State* const state = state_.load();
    // Threads of a state from before a fork are not there to be joined: it stays in memory.
    if (state && state->generation == fork_generation()) delete state;
}

Engine::State& Engine::state() {
    const unsigned generation = fork_generation();
    State* found = state_.load();
    while (!found || found->generation != generation) {
        auto fresh = std::make_unique<State>(generation);
        if (state_.compare_exchange_strong(found, fresh.get())) return *fresh.release();
    }
    return *found;
}

void Engine::run(const Images& images, float* out, const Forced& forced, Trace* trace) {
    const auto start = Clock::now();
    if (trace) {
        trace->operators.assign(steps_.size(), {});
        for (std::size_t i = 0; i < steps_.size(); ++i) {
            OperatorTrace& op = trace->operators[i];
            op.macs.resize(static_cast<std::size_t>(images.count));
            op.gate_macs.resize(static_cast<std::size_t>(images.count));
            if (program_.operators[i].gated)
                op.decisions.resize(static_cast<std::size_t>(images.count * program_.buffers[static_cast<std::size_t>(program_.operators[i].output)].channels));
        }
    }
    if (images.count <= 0) return;
    const FlushDenormals flush;
    const Lease lease(*this, trace ? 1 : images.count);
    std::int64_t done = 0;
    if (lease.pool() && !trace && images.count >= threads_) {
        done = images.count - images.count % threads_;
        const auto each = [&](std::int64_t image, int worker) {
            Team alone(nullptr, lease.scratch() + worker);
            one(images, image, out, lease.context(worker), alone, forced, nullptr);
        };
        struct Data {
            const decltype(each)& use;
            std::int64_t first;
        } data{each, 0};
        for (; data.first < done; data.first += Pool::max_tasks)
            lease.pool()->run(static_cast<int>(std::min<std::int64_t>(done - data.first, Pool::max_tasks)),
                              [](void* p, int task, int worker) noexcept {
                                  const Data& d = *static_cast<Data*>(p);
                                  d.use(d.first + task, worker);
                              }, &data);
    }
    float* own_scratch = lease.context().scratch.data();
    Team team(lease.pool(), lease.pool() ? lease.scratch() : &own_scratch);
    for (; done < images.count; ++done) one(images, done, out, lease.context(), team, forced, trace);
    if (trace) trace->ms = ms_since(start);
}

void Engine::one(const Images& images, std::int64_t image, float* out, Context& context, Team& team,
                 const Forced& forced, Trace* trace) const {
    read_input(images, image, context, team);
    for (std::size_t i = 0; i < steps_.size(); ++i) {
        const auto channels = program_.buffers[static_cast<std::size_t>(program_.operators[i].output)].channels;
        Call call{context, team};
        if (i < forced.size() && forced[i]) call.forced = forced[i] + image * channels;
        if (!trace) {
            steps_[i]->run(call);
            continue;
        }
        StepTrace step;
        call.trace = &step;
        const auto start = Clock::now();
        steps_[i]->run(call);
        OperatorTrace& op = trace->operators[i];
        op.ms += ms_since(start);
        op.gate_ms += step.gate_ms;
        op.macs[static_cast<std::size_t>(image)] = step.macs;
        op.gate_macs[static_cast<std::size_t>(image)] = step.gate_macs;
        if (step.computed) std::memcpy(op.decisions.data() + image * channels, step.computed, static_cast<std::size_t>(channels));
    }
    const auto& shape = program_.buffers[static_cast<std::size_t>(program_.output)];
    write_output(out + image * shape.size(), context, team);
}

void Engine::read_input(const Images& images, std::int64_t image, Context& context, Team& team) const {
    const Layout& layout = plan_.buffers[0];
    const Map map = layout.map(context.arena.data());
    const std::int64_t first = image * images.image;
    team.share_range(map.channels, 2.0 * map.pixels(), [&](int from, int to, float*) {
        for (int c = from; c < to; ++c) {
            clear_halo(layout, map, c);
            for (int h = 0; h < map.height; ++h) {
                const std::int64_t place = first + c * images.channel + h * images.row;
                float* const row = map.channel(c) + h * map.row;
                if (images.bytes)
                    kernels_.simple->input_bytes(static_cast<const std::uint8_t*>(images.data) + place, images.column, row, map.width,
                                                 normalisation_.scale[static_cast<std::size_t>(c)], normalisation_.shift[static_cast<std::size_t>(c)]);
                else if (images.column == 1)
                    std::memcpy(row, static_cast<const float*>(images.data) + place, static_cast<std::size_t>(map.width) * sizeof(float));
                else
                    kernels_.simple->input_floats(static_cast<const float*>(images.data) + place, images.column, row, map.width);
            }
        }
    });
}

void Engine::write_output(float* out, const Context& context, Team& team) const {
    const Layout& layout = plan_.buffers[static_cast<std::size_t>(program_.output)];
    const Map map = layout.map(const_cast<float*>(context.arena.data()));
    const std::uint8_t* mask = layout.sparse ? context.activities[static_cast<std::size_t>(program_.output)].mask() : nullptr;
    team.share_range(map.channels, 2.0 * map.pixels(), [&](int from, int to, float*) {
        for (int c = from; c < to; ++c) {
            float* const plane = out + std::int64_t{c} * map.pixels();
            if (mask && !mask[c]) {
                std::fill_n(plane, map.pixels(), 0.0f);
                continue;
            }
            for (int h = 0; h < map.height; ++h)
                std::memcpy(plane + std::int64_t{h} * map.width, map.channel(c) + h * map.row, static_cast<std::size_t>(map.width) * sizeof(float));
        }
    });
}

void Engine::set_winners(std::int64_t place, std::int64_t winners) {
    if (place < 0 || place >= static_cast<std::int64_t>(program_.operators.size()) || !program_.operators[static_cast<std::size_t>(place)].gated)
        throw std::invalid_argument("operator " + std::to_string(place) + " is no gated convolution.");
    const Operator& op = program_.operators[static_cast<std::size_t>(place)];
    const int channels = program_.buffers[static_cast<std::size_t>(op.output)].channels;
    if (winners < 1 || winners > channels)
        throw std::invalid_argument("winners is " + std::to_string(winners) + ", but must be in [1, " + std::to_string(channels) + "].");
    winners_[static_cast<std::size_t>(place)].store(static_cast<int>(winners), std::memory_order_relaxed);
}

int Engine::winners(std::size_t place) const { return winners_[place].load(std::memory_order_relaxed); }

void Engine::fill_memory(float value) {
    State& found = state();
    const std::scoped_lock lock(found.mutex);
    for (auto& context : found.contexts)
        for (Floats* floats : {&context->arena, &context->aside, &context->scratch}) std::fill_n(floats->data(), floats->size(), value);
    for (Floats& floats : found.scratch) std::fill_n(floats.data(), floats.size(), value);
}

}  // namespace thrifty
