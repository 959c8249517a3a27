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

// A fork-join pool. Workers take tasks from a shared counter, so a worker that the system does not schedule costs
// nothing: the caller does its tasks. Workers spin for a moment after the last task, since a layer follows a layer
// within microseconds, and then sleep.
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

    // The job's number, the next task and the number of tasks in one word: a worker that comes late can't take a task
    // of a job that it has not seen.
    alignas(64) std::atomic<std::uint64_t> job_{0};
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
