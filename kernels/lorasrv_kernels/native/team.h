// Threads that compute beside the caller, and never keep it waiting for having been asleep.
//
// A step makes a hundred calls of some 50 us. What else has work on this machine, such as the process that sends out the
// tokens of the step before, takes a core from a helper now and then for milliseconds. With OpenMP all threads of a team
// meet at the end of each call, so that every such moment stops the step. Here a helper that is not there when a call
// begins is not waited for: whoever is there takes all tasks.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Of torch's own threads: as many as it would use.
extern "C" int omp_get_max_threads();

namespace lorasrv {

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Team {
 public:
  static constexpr int MOST_THREADS = 256;

  // That of this library, made by the first call that needs it. Its helpers end with the process.
  static Team& shared() {
    static Team* team = new Team;
    return *team;
  }

  // Calls f(thread) in this thread, thread 0, and in as many helpers as are there, with threads below `num_threads`. f
  // shares the work out; it returns when there is none left. One caller at a time: another one works alone.
  template <typename F>
  void run(int num_threads, F f) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (num_threads <= 1 || !turn.owns_lock()) return f(0);
    while (num_helpers_ < std::min(num_threads, MOST_THREADS) - 1)
      std::thread(&Team::help, this, ++num_helpers_).detach();
    work_ = [](void* f, int thread) { (*static_cast<F*>(f))(thread); };
    context_ = &f;
    num_threads_ = num_threads;
    const uint64_t next = (state_.load(std::memory_order_relaxed) | COUNT) + 1;
    state_.store(next | OPEN);
    if (sleepers_.load()) {
      const std::lock_guard<std::mutex> lock(asleep_);
      wake_.notify_all();
    }
    f(0);
    state_.fetch_and(~OPEN, std::memory_order_acq_rel);
    while (state_.load(std::memory_order_acquire) & COUNT & ~OPEN) pause();
  }

 private:
  // Of `state_`: whether helpers may begin, and how many are at work; the number of the call above.
  static constexpr uint64_t COUNT = 0xffff, OPEN = 0x8000;
  // Longer than what lies between two calls of a step, and between two steps.
  static constexpr std::chrono::microseconds AWAKE{3000};

  void help(int thread) {
    uint64_t served = 0;
    for (;;) {
      uint64_t state = await(served);
      served = state >> 16;
      if (thread >= num_threads_) continue;
      while (state & OPEN && state >> 16 == served)
        if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
          work_(context_, thread);
          state_.fetch_sub(1, std::memory_order_release);
          break;
        }
    }
  }

  // The state of a call that is open and later than `served`.
  uint64_t await(uint64_t served) {
    const auto is_new = [&](uint64_t state) { return state & OPEN && state >> 16 != served; };
    const auto begin = std::chrono::steady_clock::now();
    for (uint64_t state;;) {
      for (int i = 0; i < 64; ++i, pause())
        if (is_new(state = state_.load(std::memory_order_acquire))) return state;
      if (std::chrono::steady_clock::now() - begin > AWAKE) break;
      std::this_thread::yield();  // to who waits for this core
    }
    std::unique_lock<std::mutex> lock(asleep_);
    sleepers_.fetch_add(1);
    uint64_t state;
    wake_.wait(lock, [&] { return is_new(state = state_.load()); });
    sleepers_.fetch_sub(1);
    return state;
  }

  std::mutex turn_, asleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> state_{0};
  std::atomic<int> sleepers_{0};
  int num_helpers_ = 0;
  // Of the call that is open.
  std::atomic<int> num_threads_{0};
  void (*work_)(void*, int) = nullptr;
  void* context_ = nullptr;
};

// Calls f(task) for each of `num_tasks`, each once, in threads that take them as they get through.
template <typename F>
inline void each_task(int64_t num_tasks, F f) {
  std::atomic<int64_t> next{0};
  Team::shared().run(std::min<int64_t>(omp_get_max_threads(), num_tasks), [&](int) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) f(task);
  });
}

}  // namespace lorasrv
