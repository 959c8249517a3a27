#include "threads.h"

#include <algorithm>
#include <chrono>
#include <mutex>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace thrifty {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto worker_spin = std::chrono::microseconds(50);
constexpr auto caller_spin = std::chrono::microseconds(200);

inline void relax() {
#if defined(__SSE2__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins until `done` or until `limit` has passed; says whether it is done.
template <class Done>
bool spin(Clock::duration limit, bool yield, Done done) {
    const auto start = Clock::now();
    do {
        for (int i = 0; i < 32; ++i) {
            if (done()) return true;
            relax();
        }
        if (yield) std::this_thread::yield();
    } while (Clock::now() - start < limit);
    return done();
}

// Cores that the calling thread may use, those of the machine where the system doesn't say.
int usable_cores() {
#if defined(__linux__)
    cpu_set_t cores;
    if (sched_getaffinity(0, sizeof cores, &cores) == 0) return CPU_COUNT(&cores);
#endif
    return static_cast<int>(std::thread::hardware_concurrency());
}

std::atomic<unsigned> generation{0};

}  // namespace

FlushDenormals::FlushDenormals() : saved_(0) {
#if defined(__SSE2__)
    const unsigned flags = _mm_getcsr();
    saved_ = flags;
    _mm_setcsr(flags | 0x8040u);  // flush to zero, denormals are zero
#elif defined(__aarch64__)
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (1ull << 24)));
#endif
}

FlushDenormals::~FlushDenormals() {
#if defined(__SSE2__)
    _mm_setcsr((_mm_getcsr() & ~0x8040u) | (static_cast<unsigned>(saved_) & 0x8040u));
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" ::"r"(saved_));
#endif
}

unsigned fork_generation() {
#if defined(__unix__) || defined(__APPLE__)
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { generation.fetch_add(1); }); });
#endif
    return generation.load(std::memory_order_relaxed);
}

Pool::Pool(int threads) : shares_(static_cast<std::size_t>(std::max(threads, 1))) {
    spin_ = threads <= usable_cores();  // else spinning takes work's place
    workers_.reserve(static_cast<std::size_t>(threads > 1 ? threads - 1 : 0));
    try {
        for (int worker = 1; worker < threads; ++worker) workers_.emplace_back([this, worker] { serve(worker); });
    } catch (...) {  // the system gives no more threads
        stop_.store(true);
        epoch_.fetch_add(1);
        epoch_.notify_all();
        for (auto& thread : workers_) thread.join();
        throw;
    }
}

Pool::~Pool() {
    stop_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& thread : workers_) thread.join();
}

void Pool::run(int tasks, Task task, void* data) {
    if (tasks <= 0) return;
    if (workers_.empty() || tasks == 1) {
        for (int i = 0; i < tasks; ++i) task(data, i, 0);
        return;
    }
    task_ = task;
    data_ = data;
    pending_.store(tasks, std::memory_order_relaxed);
    const std::uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
    const int sharers = std::min(tasks, threads());
    for (int worker = 0; worker < sharers; ++worker) {
        const auto cut = [&](int w) { return static_cast<std::uint64_t>(std::int64_t{tasks} * w / sharers); };
        shares_[static_cast<std::size_t>(worker)].left.store(
            std::uint64_t{epoch} << 32 | cut(worker) << 16 | cut(worker + 1), std::memory_order_release);
    }
    epoch_.store(epoch);
    if (sleepers_.load() > 0) epoch_.notify_all();
    work(epoch, 0);
    const auto done = [this] { return pending_.load(std::memory_order_acquire) == 0; };
    if (done() || spin(caller_spin, !spin_, done)) return;
    caller_sleeps_.store(true);
    for (int left = pending_.load(); left != 0; left = pending_.load()) pending_.wait(left);
    caller_sleeps_.store(false);
}

int Pool::Share::take(std::uint32_t epoch, End end) noexcept {
    std::uint64_t seen = left.load(std::memory_order_acquire);
    while (true) {
        const int first = static_cast<int>(seen >> 16 & 0xffff), last = static_cast<int>(seen & 0xffff);
        if (static_cast<std::uint32_t>(seen >> 32) != epoch || first >= last) return -1;
        const std::uint64_t rest = end == End::front ? seen + (1u << 16) : seen - 1;
        if (left.compare_exchange_weak(seen, rest, std::memory_order_acq_rel, std::memory_order_acquire))
            return end == End::front ? first : last - 1;
    }
}

void Pool::work(std::uint32_t epoch, int worker) noexcept {
    const std::size_t count = shares_.size();
    int done = 0;  // told all at once: the caches of all workers pass the number around
    for (std::size_t i = 0; i < count; ++i) {
        Share& share = shares_[(static_cast<std::size_t>(worker) + i) % count];
        const auto end = i == 0 ? Share::End::front : Share::End::back;
        for (int task = share.take(epoch, end); task >= 0; task = share.take(epoch, end), ++done) task_(data_, task, worker);
    }
    if (done == 0) return;
    pending_.fetch_sub(done);
    if (caller_sleeps_.load()) pending_.notify_one();
}

void Pool::serve(int worker) noexcept {
    const FlushDenormals flush;
    std::uint32_t seen = 0;
    while (true) {
        const auto news = [&] { return epoch_.load(std::memory_order_acquire) != seen; };
        if (!news() && !(spin_ && spin(worker_spin, false, news))) {
            sleepers_.fetch_add(1);
            epoch_.wait(seen);
            sleepers_.fetch_sub(1);
        }
        seen = epoch_.load();
        if (stop_.load()) return;
        work(seen, worker);
    }
}

}  // namespace thrifty
