// Fused multi-tensor AdamW + EMA + low-precision copy: every parameter is read and written once, in one launch.
//
// Bytes an element, fp32 gradient: 20 read, 16 written, 2 more with a copy. Whether the step counts (`finite`), the
// clip factor, the EMA's weight and the step counters stay on the device; a step that does not count writes nothing.
#pragma once

#include "adamw.h"
#include "device.cuh"

namespace tbcm::adamw {
namespace {

constexpr int kThreads = 256;

__global__ void begin_kernel(const Tensor *tensors, Step *steps, Addresses grads, int count, Hyper hyper,
                             const uint8_t *finite) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count && *finite) steps[i] = begin(tensors[i], grads.of[i], hyper);
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
    Memory::load(param, tensor.param + at, count);
    Memory::load(shadow, tensor.shadow + at, count);
    if (step.grad) {
      float grad[kVector], exp_avg[kVector], exp_avg_sq[kVector];
      Memory::load(grad, step.grad, at, grad_type, count);
      Memory::load(exp_avg, tensor.exp_avg + at, count);
      Memory::load(exp_avg_sq, tensor.exp_avg_sq + at, count);
#pragma unroll
      for (int k = 0; k < kVector; ++k) update(param[k], exp_avg[k], exp_avg_sq[k], grad[k] * factor, step);
      Memory::store(tensor.param + at, param, count);
      Memory::store(tensor.exp_avg + at, exp_avg, count);
      Memory::store(tensor.exp_avg_sq + at, exp_avg_sq, count);
      if (tensor.copy) Memory::store(tensor.copy, at, copy_type, param, count);
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) shadow[k] = lerp(shadow[k], param[k], weight);
    Memory::store(tensor.shadow + at, shadow, count);
  }
}

} // namespace
} // namespace tbcm::adamw

using namespace tbcm;

int tbcm_adamw_step_bytes() { return sizeof(adamw::Step); }

int tbcm_adamw_begin(const adamw::Tensor *tensors, adamw::Step *steps, const void *const *grads, int first,
                     int count, double lr, double beta1, double beta2, double eps, double weight_decay,
                     const uint8_t *finite, void *stream) {
  const adamw::Hyper hyper = {lr, beta1, beta2, eps, weight_decay};
  return with_addresses(grads, count, [=](const Addresses &addresses, int done, int now) {
    adamw::begin_kernel<<<(now + 63) / 64, 64, 0, static_cast<cudaStream_t>(stream)>>>(
        tensors + first + done, steps + first + done, addresses, now, hyper, finite);
  });
}

int tbcm_adamw_update(const adamw::Tensor *tensors, const adamw::Step *steps, const Chunk *chunks,
                      int n_chunks, int grad_type, int copy_type, const float *clip, const float *ema_weight,
                      const uint8_t *finite, void *stream) {
  if (n_chunks == 0) return cudaSuccess; // a launch of nothing is an error
  adamw::update_kernel<<<n_chunks, adamw::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      tensors, steps, chunks, grad_type, copy_type, clip, ema_weight, finite);
  return cudaGetLastError();
}
