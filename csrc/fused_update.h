// What the fused updates of AdamW (adamw.h) and CAME (came.h) share: tables, the EMA, what Python asks of the library.
//
// The arithmetic needs no CUDA header, so that the same functions compile for a GPU and for a CPU. Every rounding is
// written out (fmaf; compile with contraction off), and so is the order of every sum, so that both give the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define TBCM_INLINE __host__ __device__ __forceinline__
#define TBCM_UNROLL _Pragma("unroll")
#else
#define TBCM_INLINE inline
#define TBCM_UNROLL
#endif

namespace tbcm {

constexpr int kVersion = 2;     // of all tables and of all functions that Python calls
constexpr int kChunk = 1 << 14; // elements that one thread block updates
constexpr int kVector = 4;      // elements a thread takes at once: 16 bytes of fp32
constexpr int kLanes = 32;      // threads of a warp
static_assert(kChunk % kVector == 0);

enum Storage : int { kNone = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

// A piece of a tensor, the `index`-th.
struct Chunk {
  int32_t tensor, index;
};

template <typename T> struct alignas(kVector * sizeof(T)) Vector {
  T x[kVector];
};

// from + weight (to - from), exact at both ends, as torch.lerp.
TBCM_INLINE float lerp(float from, float to, float weight) {
  const float way = to - from;
  return weight < 0.5f ? fmaf(weight, way, from) : fmaf(weight - 1, way, to);
}

} // namespace tbcm

// What Python calls (tbcm/runtime/native.py). Here and in adamw.h and came.h pointers are the device's where not said
// otherwise. An answer other than 0 is an error, for tbcm_fused_error to explain.
extern "C" {
int tbcm_fused_version();
int tbcm_fused_chunk();
const char *tbcm_fused_error(int code);

// 0 if this library has code for the current device.
int tbcm_fused_check();
}
