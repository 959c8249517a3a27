// Threads that share the tasks of one call, and the state of the floating-point unit that they work in.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace thrifty {

// Denormals count as zero while this lives; the thread's own setting comes back after.
class FlushDenormals {
public:
    FlushDenormals();
    ~FlushDenormals();
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;

private:
    std::uint64_t saved_;
};

// A number that changes in a forked child: threads do not survive a fork, so their owner has to start new ones.
unsigned fork_generation();

// A fork-join pool. Each worker begins with an equal share of neighbouring tasks, so that what tasks of the same place
// have left in its cache layer after layer is found there; then it takes tasks off the ends of the others' shares. So a
// worker that the system does not schedule costs nothing. Workers spin for a moment after the last task, since a layer
// follows a layer within microseconds, and then sleep.
class Pool {
public:
    using Task = void (*)(void* data, int task, int worker) noexcept;

    static constexpr int max_tasks = 0xffff;

    // `threads` counts the caller: threads - 1 are started.
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    // Does tasks 0 .. tasks - 1 (at most max_tasks), the caller as worker 0. One caller at a time.
    void run(int tasks, Task task, void* data);

private:
    void work(std::uint32_t epoch, int worker) noexcept;
    void serve(int worker) noexcept;

    // What is left of a worker's share: the job's number, the next task and the end of the tasks in one word, so that a
    // worker that comes late can't take a task of a job that it has not seen.
    struct alignas(64) Share {
        std::atomic<std::uint64_t> left{0};

        enum class End { front, back };

        // A task of job `epoch`, or -1.
        int take(std::uint32_t epoch, End end) noexcept;
    };

    std::vector<Share> shares_;
    alignas(64) std::atomic<int> pending_{0};
    alignas(64) std::atomic<std::uint32_t> epoch_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> caller_sleeps_{false};
    std::atomic<bool> stop_{false};
    Task task_ = nullptr;
    void* data_ = nullptr;
    bool spin_ = true;
    std::vector<std::thread> workers_;
};

}  // namespace thrifty
