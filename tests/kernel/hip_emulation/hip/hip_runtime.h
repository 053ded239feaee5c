// SPDX-License-Identifier: Apache-2.0
// Stands in for ROCm's <hip/hip_runtime.h>: runs kernels on the CPU, one fiber per lane, a wave at a time. The lanes of
// a wave run one after the other up to a shuffle, exchange their values there, and go on. A lane that reads a lane that
// is not at the same shuffle, which is undefined on a GPU, ends the program.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  uint32_t x, y, z;
  constexpr dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  uint32_t x, y;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using hipStream_t = void*;
enum hipError_t { hipSuccess, hipErrorInvalidValue, hipErrorInvalidConfiguration };

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

inline uint32_t wave_size = 64;
inline bool last_lane_first = false;
inline hipError_t error = hipSuccess;

[[noreturn]] inline void fail(const char* problem) {
  std::fprintf(stderr, "HIP emulation: %s\n", problem);
  std::abort();
}

struct Lane {
  enum State { kRunning, kAtShuffle, kDone };

  std::vector<char> stack = std::vector<char>(1 << 16);
  ucontext_t context;
  dim3 thread;
  State state = kDone;
  uint64_t offered = 0;    // what this lane brings to the shuffle
  uint64_t exchanged = 0;  // the same once all lanes are there: a fast lane may already offer its next value
  bool took_part = false;
};

class Wave {
 public:
  // Runs body for the threads [first, first + wave_size) of a block.
  void run(uint32_t first, const std::function<void()>& body) {
    body_ = &body;
    const uint32_t threads = blockDim.x * blockDim.y * blockDim.z;
    lanes_.resize(wave_size);
    for (uint32_t i = 0; i < wave_size; ++i) {
      const uint32_t thread = first + i;
      if (thread >= threads) {
        lanes_[i].state = Lane::kDone;
        continue;
      }
      start(lanes_[i], {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y)});
    }
    while (advance()) exchange();
  }

  uint64_t shuffle_xor(uint64_t value, uint32_t mask, uint32_t width) {
    const uint32_t self = current_;
    lanes_[self].offered = value;
    lanes_[self].state = Lane::kAtShuffle;
    swapcontext(&lanes_[self].context, &scheduler_);
    const uint32_t source = self ^ mask;
    if (source / width != self / width) return value;
    if (source >= wave_size || !lanes_[source].took_part) fail("a lane reads a lane that is not at the same shuffle");
    return lanes_[source].exchanged;
  }

 private:
  void start(Lane& lane, dim3 thread) {
    lane.thread = thread;
    lane.state = Lane::kRunning;
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data();
    lane.context.uc_stack.ss_size = lane.stack.size();
    lane.context.uc_link = &scheduler_;
    makecontext(&lane.context, &Wave::enter, 0);
  }

  static void enter();

  // Runs every lane up to its next shuffle or its end; false when all have ended.
  bool advance() {
    bool waiting = false;
    for (uint32_t i = 0; i < wave_size; ++i) {
      current_ = last_lane_first ? wave_size - 1 - i : i;
      Lane& lane = lanes_[current_];
      if (lane.state == Lane::kDone) continue;
      lane.state = Lane::kDone;  // unless it comes back from a shuffle
      threadIdx = lane.thread;
      swapcontext(&scheduler_, &lane.context);
      waiting = waiting || lane.state == Lane::kAtShuffle;
    }
    return waiting;
  }

  void exchange() {
    for (Lane& lane : lanes_) {
      lane.took_part = lane.state == Lane::kAtShuffle;
      lane.exchanged = lane.offered;
    }
  }

  const std::function<void()>* body_ = nullptr;
  std::vector<Lane> lanes_;
  ucontext_t scheduler_;
  uint32_t current_ = 0;
};

inline Wave wave;

inline void Wave::enter() { (*wave.body_)(); }

inline void launch(dim3 grid, dim3 block, const std::function<void()>& body) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || grid.y > 65535 || grid.z > 65535 || threads * blocks > UINT32_MAX) {
    error = hipErrorInvalidConfiguration;
    return;
  }
  gridDim = grid;
  blockDim = block;
  for (uint32_t z = 0; z < grid.z; ++z) {
    for (uint32_t y = 0; y < grid.y; ++y) {
      for (uint32_t x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        for (uint32_t first = 0; first < threads; first += wave_size) wave.run(first, body);
      }
    }
  }
}

}  // namespace emulation

template <typename T>
T __shfl_xor(T value, int mask, int width = 0) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = emulation::wave.shuffle_xor(bits, mask, width > 0 ? width : emulation::wave_size);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

#define hipLaunchKernelGGL(kernel, grid, block, shared_bytes, stream, ...) \
  emulation::launch(grid, block, [&] { kernel(__VA_ARGS__); })

inline hipError_t hipGetLastError() {
  const hipError_t last = emulation::error;
  emulation::error = hipSuccess;
  return last;
}

inline const char* hipGetErrorString(hipError_t code) { return code == hipSuccess ? "no error" : "invalid configuration"; }
