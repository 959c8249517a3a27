#include "executor.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>

#include "sharing.h"

namespace thrifty {
namespace {

using Clock = std::chrono::steady_clock;

double seconds(Clock::duration time) { return std::chrono::duration<double>(time).count(); }

double ms_since(Clock::time_point start) { return 1e3 * seconds(Clock::now() - start); }

}  // namespace

struct Engine::State {
    explicit State(unsigned born) : generation(born) {}

    const unsigned generation;
    std::mutex mutex;
    std::vector<std::unique_ptr<Context>> contexts;  // that no call uses; there is room for those that are lent
    std::size_t lent = 0;
    std::unique_ptr<Pool> pool;
    Sharing sharing;  // of who has the pool
    std::vector<Floats> scratch;  // of the pool's workers
    std::vector<float*> scratch_pointers;
    bool pool_taken = false;
};

class Engine::Lease {
public:
    // `images`: of the call, so many contexts at most are taken for the pool's workers.
    Lease(Engine& engine, std::int64_t images, const Changes& changes) : state_(engine.state()) {
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
                contexts_.back()->settings = engine.settings_;
                engine.apply(changes, contexts_.back()->settings);
            }
            state_.contexts.reserve(state_.contexts.size() + state_.lent + contexts_.size());  // so that none is lost later
            if (!pool_) {
                Floats& scratch = contexts_.front()->scratch;
                if (!scratch.data()) scratch = Floats(engine.needs_.scratch);
                own_scratch_ = scratch.data();
            }
        } catch (...) {
            if (pool_) state_.pool_taken = false;
            throw;
        }
        state_.lent += contexts_.size();
    }

    ~Lease() {
        const std::scoped_lock lock(state_.mutex);
        for (auto& context : contexts_) state_.contexts.push_back(std::move(context));
        state_.lent -= contexts_.size();
        if (pool_) state_.pool_taken = false;
    }

    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

    Pool* pool() const { return pool_; }
    Sharing& sharing() const { return state_.sharing; }
    Context& context(int worker = 0) const { return *contexts_[static_cast<std::size_t>(worker)]; }
    // Of each worker of the pool, or of the caller alone.
    float* const* scratch() const { return pool_ ? state_.scratch_pointers.data() : &own_scratch_; }

private:
    State& state_;
    float* own_scratch_ = nullptr;  // of a call that has not got the pool
    Pool* pool_ = nullptr;
    std::vector<std::unique_ptr<Context>> contexts_;
};

Engine::Engine(const Source& source, const Limits& limits, int threads, Normalisation normalisation)
    : kernels_(kernels()), threads_(threads), program_(validate(source, limits)),
      plan_(make_plan(program_, limits)), normalisation_(std::move(normalisation)) {
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
        settings_.push_back(program_.operators[i].settings);
    }
    if (needs_.bytes() > static_cast<std::size_t>(limits.memory))
        throw std::invalid_argument("operators work in " + std::to_string(needs_.bytes()) +
                                    " bytes beside their buffers, more than the limit of " + std::to_string(limits.memory) + ".");
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

void Engine::run(const Images& images, float* out, const Forced& forced, Trace* trace, const Changes& changes) {
    const auto start = Clock::now();
    if (images.count <= 0 && !trace) return;
    const Lease lease(*this, trace ? 1 : images.count, changes);
    if (trace) {
        trace->operators.assign(steps_.size(), {});
        for (std::size_t i = 0; i < steps_.size(); ++i) {
            OperatorTrace& op = trace->operators[i];
            op.macs.resize(static_cast<std::size_t>(images.count));
            op.gate_macs.resize(static_cast<std::size_t>(images.count));
            op.kernel = steps_[i]->kernel();
            op.marks = decided(program_, program_.operators[i], lease.context().settings[i]);
            for (std::size_t axis = 0; axis < axes; ++axis)
                op.decisions[axis].resize(static_cast<std::size_t>(images.count * op.marks[axis]));
        }
    }
    const FlushDenormals flush;
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
    Team team(lease.pool(), lease.scratch()), alone(nullptr, lease.scratch());
    for (; done < images.count; ++done) {
        if (trace || !lease.pool()) {
            one(images, done, out, lease.context(), team, forced, trace);
            continue;
        }
        const auto begun = Clock::now();
        one(images, done, out, lease.context(), lease.sharing().shares() ? team : alone, forced, nullptr);
        const auto end = Clock::now();
        lease.sharing().took(seconds(end - begun), seconds(end.time_since_epoch()));
    }
    if (trace) trace->ms = ms_since(start);
}

void Engine::one(const Images& images, std::int64_t image, float* out, Context& context, Team& team,
                 const Forced& forced, Trace* trace) const {
    read_input(images, image, context, team);
    for (std::size_t i = 0; i < steps_.size(); ++i) {
        Call call{context, team};
        if (i < forced.size()) {
            const auto marks = decided(program_, program_.operators[i], {});
            for (std::size_t axis = 0; axis < axes; ++axis)
                if (forced[i][axis]) call.forced[axis] = forced[i][axis] + image * marks[axis];
        }
        if (!trace) {
            step(i, call);
            continue;
        }
        StepTrace found;
        call.trace = &found;
        const auto start = Clock::now();
        step(i, call);
        OperatorTrace& op = trace->operators[i];
        op.ms += ms_since(start);
        op.gate_ms += found.gate_ms;
        op.macs[static_cast<std::size_t>(image)] = found.macs;
        op.gate_macs[static_cast<std::size_t>(image)] = found.gate_macs;
        if (found.kernel) op.kernel = found.kernel;
        for (std::size_t axis = 0; axis < axes; ++axis) {
            const auto marks = static_cast<std::size_t>(op.marks[axis]);
            if (found.decisions[axis] && marks)
                std::memcpy(op.decisions[axis].data() + static_cast<std::size_t>(image) * marks, found.decisions[axis], marks);
        }
    }
    const auto& shape = program_.buffers[static_cast<std::size_t>(program_.output)];
    write_output(out + image * shape.size(), context, team);
}

void Engine::step(std::size_t place, const Call& call) const {
    const Operator& op = program_.operators[place];
    if (op.guard < 0) return steps_[place]->run(call);
    auto& activities = call.context.activities;
    const bool runs = activities[static_cast<std::size_t>(op.guard)].mask()[0];
    const Layout& out = plan_.buffers[static_cast<std::size_t>(op.output)];
    if (out.sparse && (out.whole || !runs)) activities[static_cast<std::size_t>(op.output)].fill(runs);
    if (runs) steps_[place]->run(call);
    else steps_[place]->skip(call);
}

void Engine::read_input(const Images& images, std::int64_t image, Context& context, Team& team) const {
    const Layout& layout = plan_.buffers[0];
    const Map map = layout.map(context.arena.data());
    const std::int64_t first = image * images.image;
    team.share_range(map.channels, 2.0 * map.pixels(), [&](int from, int to, float*) {
        for (int c = from; c < to; ++c) {
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

void Engine::set(const Changes& changes) {
    const std::scoped_lock lock(state().mutex);
    auto changed = settings_;  // an error makes no change
    apply(changes, changed);
    std::copy(changed.begin(), changed.end(), settings_.begin());  // in place: a fork meanwhile finds it whole
}

std::vector<GateSettings> Engine::settings() {
    const std::scoped_lock lock(state().mutex);
    return settings_;
}

void Engine::apply(const Changes& changes, std::vector<GateSettings>& settings) const {
    for (const Change& change : changes) {
        if (change.place < 0 || change.place >= static_cast<std::int64_t>(settings.size()))
            throw std::invalid_argument("there is no operator " + std::to_string(change.place) + ".");
        const auto i = static_cast<std::size_t>(change.place);
        thrifty::set(settings[i], program_, program_.operators[i], change.name, change.value);
    }
}

void Engine::fill_memory(float value) {
    State& found = state();
    const std::scoped_lock lock(found.mutex);
    for (auto& context : found.contexts) {
        for (Floats* floats : {&context->arena, &context->aside, &context->scratch}) std::fill_n(floats->data(), floats->size(), value);
        plan_.clear_halos(context->arena.data());
    }
    for (Floats& floats : found.scratch) std::fill_n(floats.data(), floats.size(), value);
}

}  // namespace thrifty
