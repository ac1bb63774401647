// Fused multi-tensor AdamW + EMA + low-precision copy: every parameter is read and written once, in one launch.
//
// Bytes an element, fp32 gradient: 20 read, 16 written, 2 more with a copy. Whether the step counts (`finite`), the clip
// factor, the EMA's weight and the step counters stay on the device; a step that does not count writes nothing at all.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "fused_update.h"

namespace tbcm {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4; // elements a thread takes at once: 16 bytes of fp32

// Gradients live at new addresses in every step. As an argument of a launch the addresses need neither a copy that the
// host would have to wait for nor a buffer that the next step might overwrite too soon.
constexpr int kAddresses = 448; // with the other arguments below the 4096 bytes that every driver takes
struct Addresses {
  const void *of[kAddresses];
};

__global__ void begin_kernel(const Tensor *tensors, Step *steps, Addresses grads, int count, Hyper hyper,
                             const uint8_t *finite) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count && *finite) steps[i] = begin(tensors[i], grads.of[i], hyper);
}

template <typename T> struct alignas(kVector * sizeof(T)) Vector {
  T x[kVector];
};

template <typename T> __device__ __forceinline__ bool is_aligned(const T *p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Vector<T>) == 0;
}

// A view into a larger buffer may start anywhere, and a tensor's end is rarely a whole vector: such go one by one.
template <typename T> __device__ __forceinline__ void load(float (&to)[kVector], const T *from, int count) {
  if (count == kVector && is_aligned(from)) {
    const Vector<T> v = *reinterpret_cast<const Vector<T> *>(from);
#pragma unroll
    for (int k = 0; k < kVector; ++k) to[k] = static_cast<float>(v.x[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kVector; ++k) to[k] = k < count ? static_cast<float>(from[k]) : 0.0f;
  }
}

template <typename T> __device__ __forceinline__ void store(T *to, const float (&from)[kVector], int count) {
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
__device__ __forceinline__ void load(float (&to)[kVector], const void *from, int64_t at, int type, int count) {
  if (type == kFloat32) load(to, static_cast<const float *>(from) + at, count);
  if (type == kBFloat16) load(to, static_cast<const __nv_bfloat16 *>(from) + at, count);
  if (type == kFloat16) load(to, static_cast<const __half *>(from) + at, count);
}

__device__ __forceinline__ void store(void *to, int64_t at, int type, const float (&from)[kVector], int count) {
  if (type == kBFloat16) store(static_cast<__nv_bfloat16 *>(to) + at, from, count);
  if (type == kFloat16) store(static_cast<__half *>(to) + at, from, count);
}

__global__ void __launch_bounds__(kThreads)
    update_kernel(const Tensor *tensors, const Step *steps, const Chunk *chunks, int grad_type, int copy_type,
                  const float *clip, const float *ema_weight, const uint8_t *finite) {
  if (!*finite) return;
  const Chunk chunk = chunks[blockIdx.x];
  const Tensor tensor = tensors[chunk.tensor];
  const Step step = steps[chunk.tensor];
  const float factor = *clip, weight = *ema_weight;
  const int64_t start = static_cast<int64_t>(chunk.index) * kChunk;
  const int size = static_cast<int>(min(tensor.numel - start, static_cast<int64_t>(kChunk)));

  for (int i = kVector * threadIdx.x; i < size; i += kVector * kThreads) {
    const int64_t at = start + i;
    const int count = min(size - i, kVector);
    float param[kVector], shadow[kVector];
    load(param, tensor.param + at, count);
    load(shadow, tensor.shadow + at, count);
    if (step.grad) {
      float grad[kVector], exp_avg[kVector], exp_avg_sq[kVector];
      load(grad, step.grad, at, grad_type, count);
      load(exp_avg, tensor.exp_avg + at, count);
      load(exp_avg_sq, tensor.exp_avg_sq + at, count);
#pragma unroll
      for (int k = 0; k < kVector; ++k) adamw(param[k], exp_avg[k], exp_avg_sq[k], grad[k] * factor, step);
      store(tensor.param + at, param, count);
      store(tensor.exp_avg + at, exp_avg, count);
      store(tensor.exp_avg_sq + at, exp_avg_sq, count);
      if (tensor.copy) store(tensor.copy, at, copy_type, param, count);
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) shadow[k] = lerp(shadow[k], param[k], weight);
    store(tensor.shadow + at, shadow, count);
  }
}

} // namespace
} // namespace tbcm

using namespace tbcm;

int tbcm_fused_version() { return kVersion; }
int tbcm_fused_chunk() { return kChunk; }
int tbcm_fused_step_bytes() { return sizeof(Step); }
const char *tbcm_fused_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int tbcm_fused_check() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, begin_kernel);
  return error == cudaSuccess ? cudaSuccess : (cudaGetLastError(), error); // a launch must not find the error later
}

int tbcm_fused_begin(const Tensor *tensors, Step *steps, const void *const *grads, int first, int count, double lr,
                     double beta1, double beta2, double eps, double weight_decay, const uint8_t *finite, void *stream) {
  const Hyper hyper = {lr, beta1, beta2, eps, weight_decay};
  for (int done = 0; done < count; done += kAddresses) {
    const int now = count - done < kAddresses ? count - done : kAddresses;
    Addresses addresses = {};
    for (int i = 0; i < now; ++i) addresses.of[i] = grads[done + i];
    begin_kernel<<<(now + 63) / 64, 64, 0, static_cast<cudaStream_t>(stream)>>>(
        tensors + first + done, steps + first + done, addresses, now, hyper, finite);
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  return cudaSuccess;
}

int tbcm_fused_update(const Tensor *tensors, const Step *steps, const Chunk *chunks, int n_chunks, int grad_type,
                      int copy_type, const float *clip, const float *ema_weight, const uint8_t *finite, void *stream) {
  if (n_chunks == 0) return cudaSuccess; // a launch of nothing is an error
  update_kernel<<<n_chunks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      tensors, steps, chunks, grad_type, copy_type, clip, ema_weight, finite);
  return cudaGetLastError();
}
