// Whether several threads do a short call or one does it alone.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>

namespace thrifty {

// Goes by what has been faster lately. Where the system gives two threads one core between them, a call that they share
// takes up to twice as long as one thread needs, and whether it does changes from one moment to the next: so now and
// then a call or two go the other way, and sooner where calls have become slower. What takes long is always shared.
//
// Times only grow by what disturbs them, so the least of a few is compared. All are in seconds.
class Sharing {
public:
    // How the next call is to be done.
    bool shares() const { return trial_left_ > 0 ? !shares_ : shares_; }

    // What it took, until the moment `now`.
    void took(double seconds, double now) {
        if (trial_left_ > 0) {
            trial_ = std::min(trial_, seconds);
            if (--trial_left_ == 0) decide(now);
            return;
        }
        last_[place_] = seconds;
        place_ = (place_ + 1) % few;
        calls_ = std::min(calls_ + 1, least_calls);
        if (calls_ < least_calls) return;
        if (lately() > long_call) {
            shares_ = true;
        } else if (now >= next_ || lately() > slower * usual_) {
            trial_left_ = trial_calls;
            trial_ = never;
        }
    }

private:
    static constexpr std::size_t few = 5;
    static constexpr int least_calls = 8, trial_calls = 2;
    static constexpr double long_call = 2e-3;                // sharing costs microseconds a layer
    static constexpr double slower = 1.2, better = 0.95;     // than before; than the other way, to leave it
    static constexpr double first_wait = 0.1, last_wait = 0.8;  // between trials, twice as long after each that fails
    static constexpr double never = std::numeric_limits<double>::infinity();

    double lately() const { return *std::min_element(last_.begin(), last_.end()); }

    void decide(double now) {
        const bool change = trial_ < better * lately();
        if (change) shares_ = !shares_;
        wait_ = change ? first_wait : std::min(2 * wait_, last_wait);
        usual_ = std::min(trial_, lately());
        next_ = now + wait_;
        calls_ = 0;
    }

    bool shares_ = true;
    int trial_left_ = 0;
    int calls_ = 0;  // since the last decision, as far as it matters
    std::size_t place_ = 0;
    double trial_ = never, usual_ = never, wait_ = first_wait, next_ = 0;
    std::array<double, few> last_{};  // not looked at before all are calls of the way that it is now
};

}  // namespace thrifty
