// The arithmetic and the table of the fused AdamW (adamw.cuh): one pass of AdamW, EMA and low-precision copy.
//
// All arithmetic is fp32; only the bias corrections, once a tensor, are fp64: 1 - beta^t loses its digits in fp32.
#pragma once

#include "fused_update.h"

namespace tbcm::adamw {

// A parameter and its state, all of `numel` elements in the same order; on the device, filled in once. Its pieces are
// elements [index * kChunk, (index + 1) * kChunk).
struct Tensor {
  float *param, *exp_avg, *exp_avg_sq;
  float *shadow; // the EMA's
  void *copy;    // the parameter in a narrower type, or null
  float *step;   // scalar: updates done, as torch.optim.AdamW keeps it
  int64_t numel;
};

struct Hyper {
  double lr, beta1, beta2, eps, weight_decay;
};

// What one update of one tensor needs beside the tensor; made on the device by `begin`.
struct Step {
  const void *grad; // null: the parameter had no gradient, so AdamW leaves it alone and the EMA alone goes on
  float decay, beta1, beta2, eps, step_size, bias_correction2_sqrt;
};

// Counts the update and works out its coefficients. The bias corrections are those of the betas as rounded to fp32,
// with which `update` averages: m / (1 - beta1^t) is then free of bias.
TBCM_INLINE Step begin(const Tensor &tensor, const void *grad, const Hyper &h) {
  Step s = {};
  s.grad = grad;
  if (!grad) return s;
  *tensor.step += 1;
  s.beta1 = static_cast<float>(h.beta1);
  s.beta2 = static_cast<float>(h.beta2);
  s.eps = static_cast<float>(h.eps);
  s.decay = static_cast<float>(h.lr * h.weight_decay);
  const double t = *tensor.step;
  s.step_size = static_cast<float>(h.lr / (1 - pow(static_cast<double>(s.beta1), t)));
  s.bias_correction2_sqrt = static_cast<float>(sqrt(1 - pow(static_cast<double>(s.beta2), t)));
  return s;
}

// Loshchilov and Hutter 2019 (arXiv 1711.05101), Algorithm 2, in the order of torch.optim.AdamW(fused=True).
TBCM_INLINE void update(float &param, float &exp_avg, float &exp_avg_sq, float grad, const Step &s) {
  if (s.decay != 0) param = fmaf(-s.decay, param, param);
  exp_avg = fmaf(s.beta1, exp_avg, fmaf(-s.beta1, grad, grad));
  const float square = grad * grad;
  exp_avg_sq = fmaf(s.beta2, exp_avg_sq, fmaf(-s.beta2, square, square));
  param -= s.step_size * exp_avg / (sqrtf(exp_avg_sq) / s.bias_correction2_sqrt + s.eps);
}

} // namespace tbcm::adamw

extern "C" {
int tbcm_adamw_step_bytes();

// Begins the update of tensors[first : first + count], whose gradients are `grads` (host array of `count` device
// pointers, read before it returns). Where *finite is false it does nothing.
int tbcm_adamw_begin(const tbcm::adamw::Tensor *tensors, tbcm::adamw::Step *steps, const void *const *grads, int first,
                     int count, double lr, double beta1, double beta2, double eps, double weight_decay,
                     const uint8_t *finite, void *stream);

// Updates all chunks with gradients of the type `grad_type` times *clip, and writes copies of the type `copy_type`
// (Storage; those of null pointers are left out). Where *finite is false it does nothing.
int tbcm_adamw_update(const tbcm::adamw::Tensor *tensors, const tbcm::adamw::Step *steps, const tbcm::Chunk *chunks,
                      int n_chunks, int grad_type, int copy_type, const float *clip, const float *ema_weight,
                      const uint8_t *finite, void *stream);
}
