// How the kernels read and write: vectors of four where memory allows it, and gradients' addresses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "fused_update.h"

namespace tbcm {
namespace {

// Gradients live at new addresses in every step. As an argument of a launch the addresses need neither a copy that the
// host would have to wait for nor a buffer that the next step might overwrite too soon.
constexpr int kAddresses = 448; // with other arguments below the 4096 bytes that every driver takes
struct Addresses {
  const void *of[kAddresses];
};

// Calls launch(addresses, first, count) for all of `grads`, as many at a time as fit. Returns a launch's error or 0.
template <typename Launch> int with_addresses(const void *const *grads, int count, Launch launch) {
  for (int done = 0; done < count; done += kAddresses) {
    const int now = count - done < kAddresses ? count - done : kAddresses;
    Addresses addresses = {};
    for (int i = 0; i < now; ++i) addresses.of[i] = grads[done + i];
    launch(addresses, done, now);
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  return cudaSuccess;
}

template <typename T> __device__ __forceinline__ bool is_aligned(const T *p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Vector<T>) == 0;
}

// A view into a larger buffer may start anywhere, and a tensor's end is rarely a whole vector: such go one by one. That
// memory is global, the compiler cannot know of an address in a table: it is told.
struct Memory {
  // `count` elements, and zeros for the rest of a vector.
  template <typename T> static __device__ __forceinline__ void load(float (&to)[kVector], const T *from, int count) {
    __builtin_assume(__isGlobal(from));
    if (count == kVector && is_aligned(from)) {
      const Vector<T> v = *reinterpret_cast<const Vector<T> *>(from);
#pragma unroll
      for (int k = 0; k < kVector; ++k) to[k] = static_cast<float>(v.x[k]);
    } else {
#pragma unroll
      for (int k = 0; k < kVector; ++k) to[k] = k < count ? static_cast<float>(from[k]) : 0.0f;
    }
  }

  template <typename T> static __device__ __forceinline__ void store(T *to, const float (&from)[kVector], int count) {
    __builtin_assume(__isGlobal(to));
    if (count == kVector && is_aligned(to)) {
      Vector<T> v;
#pragma unroll
      for (int k = 0; k < kVector; ++k) v.x[k] = static_cast<T>(from[k]);
      *reinterpret_cast<Vector<T> *>(to) = v;
    } else {
#pragma unroll
      for (int k = 0; k < kVector; ++k)
        if (k < count) to[k] = static_cast<T>(from[k]);
    }
  }

  // The same for a type that is known at run time alone; it is the same for all threads.
  static __device__ __forceinline__ void load(float (&to)[kVector], const void *from, int64_t at, int type, int count) {
    if (type == kFloat32) load(to, static_cast<const float *>(from) + at, count);
    if (type == kBFloat16) load(to, static_cast<const __nv_bfloat16 *>(from) + at, count);
    if (type == kFloat16) load(to, static_cast<const __half *>(from) + at, count);
  }

  static __device__ __forceinline__ void store(void *to, int64_t at, int type, const float (&from)[kVector],
                                               int count) {
    if (type == kBFloat16) store(static_cast<__nv_bfloat16 *>(to) + at, from, count);
    if (type == kFloat16) store(static_cast<__half *>(to) + at, from, count);
  }

  // One number.
  static __device__ __forceinline__ float get(const float *from) {
    __builtin_assume(__isGlobal(from));
    return *from;
  }

  // The same one for all threads of a warp, which is read once.
  static __device__ __forceinline__ float get_together(const float *from) { return get(from); }

  static __device__ __forceinline__ void put(float *to, float value) {
    __builtin_assume(__isGlobal(to));
    *to = value;
  }
};

} // namespace
} // namespace tbcm
