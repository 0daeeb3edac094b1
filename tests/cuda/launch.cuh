// Stands in for csrc/cuda/kernels/launch.cuh: runs the kernels on the CPU, block after block, every
// thread of a block as a coroutine that is left at barriers. The threads take turns in alternating
// order, so that a missing barrier shows. A barrier that only a part of the threads reaches ends
// the program.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../tiling.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

namespace rf::cuda {
namespace {

struct Index {
  unsigned x;
};

Index threadIdx, blockIdx;

// Coroutines that live as long as the program: each runs the body, leaves, and runs it again. Only
// their first entry goes through the operating system's contexts, which are slow.
class Coroutines {
 public:
  void run(const std::function<void()>& body) {
    body_ = &body;
    for (bool forward = true;; forward = !forward) {
      int done = 0;
      for (int i = 0; i < kThreads; ++i) {
        threadIdx.x = static_cast<unsigned>(forward ? i : kThreads - 1 - i);
        done += turn(threads_[threadIdx.x]);
      }
      if (done == kThreads) return;
      if (done != 0) {
        std::fprintf(stderr, "a barrier was reached by a part of the threads only\n");
        std::abort();
      }
    }
  }

  void wait() { leave(threads_[threadIdx.x], false); }

 private:
  static constexpr size_t kStack = 65536;

  struct Thread {
    std::unique_ptr<char[]> stack;
    jmp_buf place;
    bool done;
  };

  // Up to the thread's next barrier, or to its end; whether it has ended.
  bool turn(Thread& thread) {
    if (_setjmp(scheduler_) == 0) {
      if (thread.stack != nullptr) _longjmp(thread.place, 1);
      thread.stack = std::make_unique<char[]>(kStack);
      ucontext_t context;
      getcontext(&context);
      context.uc_stack.ss_sp = thread.stack.get();
      context.uc_stack.ss_size = kStack;
      makecontext(&context, &Coroutines::enter, 0);
      setcontext(&context);
    }
    return thread.done;
  }

  void leave(Thread& thread, bool done) {
    thread.done = done;
    if (_setjmp(thread.place) == 0) _longjmp(scheduler_, 1);
  }

  static void enter();

  const std::function<void()>* body_ = nullptr;
  jmp_buf scheduler_;
  Thread threads_[kThreads];
};

Coroutines& coroutines() {
  static Coroutines all;
  return all;
}

void Coroutines::enter() {
  Coroutines& all = coroutines();
  Thread& self = all.threads_[threadIdx.x];
  while (true) {
    (*all.body_)();
    all.leave(self, true);
  }
}

[[maybe_unused]] void __syncthreads() { coroutines().wait(); }

template <class... Parameters>
void launch(
    void (*kernel)(Parameters...), int64_t blocks, int, void*, const Parameters&... arguments) {
  const std::function<void()> body = [&] { kernel(arguments...); };
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    coroutines().run(body);
  }
}

}  // namespace
}  // namespace rf::cuda
