// The four passes of the fused CAME (came.h) over the weights, each for one thread of a tile. The kernels (came.cuh)
// and the CPU of the tests run this same text, so the loads and stores that are counted there are the kernels' own.
//
// `Memory` reads and writes vectors; `rows.add(r, x)` takes what the thread has of the sum over row r, and `cols` are
// its sums over columns. Loads come several at once, so that enough of them are on their way.
#pragma once

#include "came.h"

namespace tbcm::came {

// The vectors of a thread in a tile: number r has the elements [at(r), at(r) + count(r)), of row `row + r` and of the
// columns from `col` on, where it is a matrix.
struct Place {
  int64_t start, stride, numel;
  int columns;
  int64_t row, col;
  int across, down; // of the tile among those of a matrix

  TBCM_INLINE int64_t at(int r) const { return start + r * stride; }
  TBCM_INLINE int count(int r) const { // rows beyond the last begin beyond the last element
    const int64_t left = numel - at(r);
    return left <= 0 || columns <= 0 ? 0 : left < columns ? static_cast<int>(left) : columns;
  }
};

TBCM_INLINE Place place(const Tensor &t, int tile, int warp, int lane) {
  Place p = {};
  p.numel = numel(t);
  p.row = warp * kRows;
  p.col = lane * kVector;
  p.columns = kVector;
  p.stride = kSide;
  if (!t.rows) {
    p.start = static_cast<int64_t>(tile) * kChunk + p.row * p.stride + p.col;
    return p;
  }
  const int wide = static_cast<int>(pieces(t.cols, kSide));
  p.across = tile % wide;
  p.down = tile / wide;
  p.row += static_cast<int64_t>(p.down) * kSide;
  p.col += static_cast<int64_t>(p.across) * kSide;
  if (t.cols - p.col < kVector) p.columns = static_cast<int>(t.cols - p.col);
  p.stride = t.cols;
  p.start = p.row * p.stride + p.col;
  return p;
}

TBCM_INLINE float sum(const float (&x)[kVector]) { return (x[0] + x[1]) + (x[2] + x[3]); }

// What a thread works on.
struct Work {
  const Tensor &tensor;
  const Step &step;
  Place place;
  int grad_type;
  float clip;
};

template <class Memory> TBCM_THREAD float row_factor(const Work &w, int r) {
  const int64_t row = w.place.row + r;
  return row < w.tensor.rows ? Memory::get_together(row_factors(w.tensor) + row) : 0.0f;
}

template <class Memory> TBCM_THREAD void load_col_factors(float (&to)[kVector], const Work &w) {
  Memory::load(to, col_factors(w.tensor) + w.place.col, w.place.columns < 0 ? 0 : w.place.columns);
}

template <class Memory> TBCM_THREAD void load_grad(float (&to)[kVector], const Work &w, int r) {
  Memory::load(to, w.step.grad, w.place.at(r), w.grad_type, w.place.count(r));
}

// The same of a tensor like the parameter.
template <class Memory> TBCM_THREAD void load(float (&to)[kVector], const float *from, const Work &w, int r) {
  Memory::load(to, from + w.place.at(r), w.place.count(r));
}

template <class Memory> TBCM_THREAD void store(float *to, const float (&from)[kVector], const Work &w, int r) {
  Memory::store(to + w.place.at(r), from, w.place.count(r));
}

template <class Memory, class Rows> TBCM_THREAD void squares(const Work &w, Rows &rows, float (&cols)[kVector]) {
  constexpr int kAtOnce = 4;
  for (int first = 0; first < kRows; first += kAtOnce) {
    float grads[kAtOnce][kVector];
    TBCM_UNROLL
    for (int k = 0; k < kAtOnce; ++k) load_grad<Memory>(grads[k], w, first + k);
    TBCM_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      float square[kVector];
      TBCM_UNROLL
      for (int j = 0; j < kVector; ++j) {
        square[j] = grads[k][j] * grads[k][j];
        cols[j] += square[j];
      }
      rows.add(first + k, sum(square));
    }
  }
}

// u of one number that is in no matrix, before it is clipped.
TBCM_INLINE float full_update(float grad, float square) { return grad / sqrtf(square); }

template <class Memory> TBCM_THREAD float full_sizes(const Work &w) {
  const Hyper &h = w.step.hyper;
  const float weight = static_cast<float>(1 - h.beta2), eps = static_cast<float>(h.eps1);
  float sums[kVector] = {};
  for (int r = 0; r < kRows && w.place.count(r); ++r) {
    float grad[kVector], square[kVector];
    load_grad<Memory>(grad, w, r);
    load<Memory>(square, w.tensor.square, w, r);
    TBCM_UNROLL
    for (int j = 0; j < kVector; ++j) {
      const float clipped = grad[j] * w.clip;
      square[j] = lerp(square[j], clipped * clipped + eps, weight);
      const float u = full_update(clipped, square[j]);
      if (j < w.place.count(r)) sums[j] += u * u;
    }
    store<Memory>(w.tensor.square, square, w, r);
  }
  return sum(sums);
}

template <class Memory> TBCM_THREAD float matrix_sizes(const Work &w) {
  constexpr int kAtOnce = 4;
  float sums[kVector] = {}, col[kVector];
  load_col_factors<Memory>(col, w);
  for (int first = 0; first < kRows; first += kAtOnce) {
    float grads[kAtOnce][kVector];
    TBCM_UNROLL
    for (int k = 0; k < kAtOnce; ++k) load_grad<Memory>(grads[k], w, first + k);
    TBCM_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      const float row = row_factor<Memory>(w, first + k);
      TBCM_UNROLL
      for (int j = 0; j < kVector; ++j) {
        const float u = grads[k][j] * row * col[j];
        sums[j] += u * u;
      }
    }
  }
  return sum(sums);
}

// The thread's share of the sum of u^2.
template <class Memory> TBCM_THREAD float sizes(const Work &w) {
  return w.tensor.rows ? matrix_sizes<Memory>(w) : full_sizes<Memory>(w);
}

template <class Memory, class Rows> TBCM_THREAD void momentum(const Work &w, Rows &rows, float (&cols)[kVector]) {
  constexpr int kAtOnce = 2;
  const float weight = static_cast<float>(1 - w.step.hyper.beta1);
  float col[kVector];
  load_col_factors<Memory>(col, w);
  TBCM_UNROLL
  for (int j = 0; j < kVector; ++j) col[j] *= w.step.scale;
  for (int first = 0; first < kRows; first += kAtOnce) {
    float grads[kAtOnce][kVector], m[kAtOnce][kVector];
    TBCM_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      load_grad<Memory>(grads[k], w, first + k);
      load<Memory>(m[k], w.tensor.momentum, w, first + k);
    }
    TBCM_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      const float row = row_factor<Memory>(w, first + k);
      float square[kVector];
      TBCM_UNROLL
      for (int j = 0; j < kVector; ++j) {
        const float u = grads[k][j] * row * col[j];
        m[k][j] = lerp(m[k][j], u, weight);
        const float way = u - m[k][j];
        square[j] = way * way;
        cols[j] += square[j];
      }
      store<Memory>(w.tensor.momentum, m[k], w, first + k);
      rows.add(first + k, sum(square));
    }
  }
}

// lr times the update of vector r. Its momentum is ready in a matrix, and is made here of all else.
template <class Memory>
TBCM_THREAD void change(float (&by)[kVector], const Work &w, int r, const float (&col)[kVector]) {
  load<Memory>(by, w.tensor.momentum, w, r);
  if (w.tensor.rows) {
    const float row = row_factor<Memory>(w, r); // with lr
    TBCM_UNROLL
    for (int j = 0; j < kVector; ++j) by[j] = by[j] * row * col[j];
    return;
  }
  const float weight = static_cast<float>(1 - w.step.hyper.beta1), lr = static_cast<float>(w.step.hyper.lr);
  float grad[kVector], square[kVector];
  load_grad<Memory>(grad, w, r);
  load<Memory>(square, w.tensor.square, w, r);
  TBCM_UNROLL
  for (int j = 0; j < kVector; ++j)
    by[j] = lerp(by[j], full_update(grad[j] * w.clip, square[j]) * w.step.scale, weight);
  store<Memory>(w.tensor.momentum, by, w, r);
  TBCM_UNROLL
  for (int j = 0; j < kVector; ++j) by[j] *= lr;
}

template <class Memory> TBCM_THREAD void apply(const Work &w, int copy_type, float ema_weight) {
  const Tensor &t = w.tensor;
  const bool changes = w.step.grad;
  const float decay = changes ? static_cast<float>(w.step.hyper.lr * w.step.hyper.weight_decay) : 0.0f;
  float col[kVector] = {};
  if (changes && t.rows) load_col_factors<Memory>(col, w);
  for (int r = 0; r < kRows && w.place.count(r); ++r) {
    float param[kVector], shadow[kVector];
    load<Memory>(param, t.param, w, r);
    load<Memory>(shadow, t.shadow, w, r);
    if (changes) {
      float by[kVector];
      change<Memory>(by, w, r, col);
      TBCM_UNROLL
      for (int j = 0; j < kVector; ++j) {
        if (decay != 0) param[j] = fmaf(-decay, param[j], param[j]);
        param[j] -= by[j];
      }
      store<Memory>(t.param, param, w, r);
      if (t.copy) Memory::store(t.copy, w.place.at(r), copy_type, param, w.place.count(r));
    }
    TBCM_UNROLL
    for (int j = 0; j < kVector; ++j) shadow[j] = lerp(shadow[j], param[j], ema_weight);
    store<Memory>(t.shadow, shadow, w, r);
  }
}

} // namespace tbcm::came
