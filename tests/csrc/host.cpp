// csrc/fused_update.cu for a CPU: the same functions over the same tables, with a plain loop for a grid of threads.
#include <cstring>

#include "fused_update.h"

using namespace tbcm;

namespace {

struct BFloat16 { // rounds to nearest even; NaN is left out
  uint16_t bits;
  explicit BFloat16(float value) {
    uint32_t wide;
    memcpy(&wide, &value, 4);
    bits = static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
  }
};

template <typename Grad, typename Copy>
void update(const Tensor &t, const Step &s, int index, float clip, float weight) {
  const int64_t start = static_cast<int64_t>(index) * kChunk;
  for (int64_t i = start; i < start + kChunk && i < t.numel; ++i) {
    if (s.grad) {
      const float grad = static_cast<float>(static_cast<const Grad *>(s.grad)[i]);
      adamw(t.param[i], t.exp_avg[i], t.exp_avg_sq[i], grad * clip, s);
      if (t.copy) static_cast<Copy *>(t.copy)[i] = static_cast<Copy>(t.param[i]);
    }
    t.shadow[i] = lerp(t.shadow[i], t.param[i], weight);
  }
}

using Update = void (*)(const Tensor &, const Step &, int, float, float);

template <typename Grad> Update update_for(int copy_type) {
  return copy_type == kFloat16 ? update<Grad, _Float16> : update<Grad, BFloat16>;
}

} // namespace

int tbcm_fused_version() { return kVersion; }
int tbcm_fused_chunk() { return kChunk; }
int tbcm_fused_step_bytes() { return sizeof(Step); }
const char *tbcm_fused_error(int) { return "no error"; }
int tbcm_fused_check() { return 0; }

int tbcm_fused_begin(const Tensor *tensors, Step *steps, const void *const *grads, int first, int count, double lr,
                     double beta1, double beta2, double eps, double weight_decay, const uint8_t *finite, void *) {
  for (int i = 0; i < count && *finite; ++i)
    steps[first + i] = begin(tensors[first + i], grads[i], {lr, beta1, beta2, eps, weight_decay});
  return 0;
}

int tbcm_fused_update(const Tensor *tensors, const Step *steps, const Chunk *chunks, int n_chunks, int grad_type,
                      int copy_type, const float *clip, const float *ema_weight, const uint8_t *finite, void *) {
  const Update update = grad_type == kFloat32    ? update_for<float>(copy_type)
                        : grad_type == kBFloat16 ? update_for<BFloat16>(copy_type)
                                                 : update_for<_Float16>(copy_type);
  for (int c = 0; c < n_chunks && *finite; ++c)
    update(tensors[chunks[c].tensor], steps[chunks[c].tensor], chunks[c].index, *clip, *ema_weight);
  return 0;
}
