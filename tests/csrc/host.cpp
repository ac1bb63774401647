// csrc/fused_update.cu for a CPU, but for CAME (host_came.cpp): the same functions over the same tables, with a plain
// loop for a grid of threads.
#include <algorithm>

#include "adamw.h"
#include "host.h"

using namespace tbcm;

int tbcm_fused_version() { return kVersion; }
int tbcm_fused_chunk() { return kChunk; }
const char *tbcm_fused_error(int) { return "no error"; }
int tbcm_fused_check() { return 0; }

extern "C" double tbcm_host_bytes() { // loaded and stored since the last question
  const double bytes = Memory::bytes;
  Memory::bytes = 0;
  return bytes;
}

int tbcm_adamw_step_bytes() { return sizeof(adamw::Step); }

int tbcm_adamw_begin(const adamw::Tensor *tensors, adamw::Step *steps, const void *const *grads, int first, int count,
                     double lr, double beta1, double beta2, double eps, double weight_decay, const uint8_t *finite,
                     void *) {
  for (int i = 0; i < count && *finite; ++i)
    steps[first + i] = begin(tensors[first + i], grads[i], {lr, beta1, beta2, eps, weight_decay});
  return 0;
}

static void update(const adamw::Tensor &t, const adamw::Step &s, int64_t at, int count, int grad_type, int copy_type,
                   float clip, float weight) {
  float param[kVector], shadow[kVector];
  Memory::load(param, t.param + at, count);
  Memory::load(shadow, t.shadow + at, count);
  if (s.grad) {
    float grad[kVector], exp_avg[kVector], exp_avg_sq[kVector];
    Memory::load(grad, s.grad, at, grad_type, count);
    Memory::load(exp_avg, t.exp_avg + at, count);
    Memory::load(exp_avg_sq, t.exp_avg_sq + at, count);
    for (int k = 0; k < count; ++k) adamw::update(param[k], exp_avg[k], exp_avg_sq[k], grad[k] * clip, s);
    Memory::store(t.param + at, param, count);
    Memory::store(t.exp_avg + at, exp_avg, count);
    Memory::store(t.exp_avg_sq + at, exp_avg_sq, count);
    if (t.copy) Memory::store(t.copy, at, copy_type, param, count);
  }
  for (int k = 0; k < count; ++k) shadow[k] = lerp(shadow[k], param[k], weight);
  Memory::store(t.shadow + at, shadow, count);
}

int tbcm_adamw_update(const adamw::Tensor *tensors, const adamw::Step *steps, const Chunk *chunks, int n_chunks,
                      int grad_type, int copy_type, const float *clip, const float *ema_weight, const uint8_t *finite,
                      void *) {
  for (int c = 0; c < n_chunks && *finite; ++c) {
    const adamw::Tensor &t = tensors[chunks[c].tensor];
    const int64_t start = static_cast<int64_t>(chunks[c].index) * kChunk, end = std::min(start + kChunk, t.numel);
    for (int64_t at = start; at < end; at += kVector)
      update(t, steps[chunks[c].tensor], at, static_cast<int>(std::min<int64_t>(kVector, end - at)), grad_type,
             copy_type, *clip, *ema_weight);
  }
  return 0;
}
