// Runs CUDA kernels as plain C++, for tests without a GPU: one block after another, each thread of a block a fiber that
// runs until it has to wait for others. Slow, and blind to hardware effects, but every index, barrier and sum is real.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

inline dim3 thread_index, block_index, block_size, grid_size;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  int64_t barriers = 0, shuffles = 0;  // number reached so far
  float offered[2] = {};
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int current = 0;
inline unsigned launches = 0;
inline const std::function<void()>* body = nullptr;

inline void enter() {
  (*body)();
  fibers[current].done = true;
}

inline void wait() { swapcontext(&fibers[current].context, &scheduler); }

// Waits until every fiber of [first, last) has reached the same count. A fiber that has ended never will: on a GPU that is
// undefined behavior, here it aborts.
inline void meet(int first, int last, int64_t Fiber::*count) {
  const int64_t target = ++(fibers[current].*count);
  for (bool all = false; !all;) {
    all = true;
    for (int i = first; i < last; ++i) {
      if (fibers[i].*count >= target) continue;
      if (fibers[i].done) std::abort();
      all = false;
    }
    if (!all) wait();
  }
}

inline void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  const int threads = static_cast<int>(block.x);
  // Forwards or backwards, in an irregular order: a missing barrier then gives different results.
  const bool backwards = __builtin_parity(launches++) != 0;
  if (block.y != 1 || block.z != 1 || threads % 32 != 0 || threads > 1024 || grid.y > 65535) std::abort();
  block_size = block, grid_size = grid, body = &kernel;
  fibers.resize(threads);
  for (Fiber& fiber : fibers) fiber.stack.resize(1 << 16);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      block_index = dim3(x, y);
      for (Fiber& fiber : fibers) {
        fiber.done = false, fiber.barriers = fiber.shuffles = 0;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
      }
      for (bool running = true; running;) {
        running = false;
        for (int turn = 0; turn < threads; ++turn) {
          const int i = backwards ? threads - 1 - turn : turn;
          if (fibers[i].done) continue;
          running = true, current = i;
          thread_index = dim3(static_cast<unsigned>(i));
          swapcontext(&scheduler, &fibers[i].context);
        }
      }
      // A barrier that not all threads reach would hang a GPU.
      for (const Fiber& fiber : fibers) {
        if (fiber.barriers != fibers[0].barriers) std::abort();
      }
    }
  }
}

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

inline void __syncthreads() {
  emulator::meet(0, static_cast<int>(emulator::fibers.size()), &emulator::Fiber::barriers);
}

inline float __shfl_xor_sync(unsigned mask, float value, int lanes) {
  if (mask != 0xffffffffu) std::abort();
  using namespace emulator;
  const int warp = current / 32 * 32, slot = static_cast<int>(fibers[current].shuffles % 2);
  fibers[current].offered[slot] = value;
  meet(warp, warp + 32, &Fiber::shuffles);
  return fibers[current ^ lanes].offered[slot];  // overwritten two shuffles later, when all fibers have read it
}

namespace emulator {

template <class T>
float to_float(uint16_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return static_cast<float>(x);
}

template <class T>
uint16_t from_float(float value) {
  const T x(value);
  uint16_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

}  // namespace emulator
