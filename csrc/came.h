// The arithmetic and the table of the fused CAME (came.cuh): Luo et al. 2023, arXiv 2307.02047, Algorithm 2, as
// tbcm/runtime/came.py says it, with clipping, EMA and low-precision copy. Between four passes over the weights
// (came_passes.h) sums over rows, columns and tensors become averages and factors:
//
//   squares    g                             sums of g^2, from which the caller makes the norm and the clip factor
//     factors  r, c, from them r c'          (the sums scale with the square of the clip factor)
//   sizes      g                             sum of u^2; of what is no matrix also g, v -> v
//     scale    1 / max(1, RMS(u) / d)
//   momentum   g, m -> m                     sums of (u - m)^2; matrices alone
//     factors  R, C, from them R C'
//   apply      p, m, shadow -> p, shadow     of what is no matrix also g, v and -> m
//
// Of 4 bytes each: 10 numbers a weight of a matrix, 12 of another. A thread adds 64 numbers in fp32 and a tile those of
// its threads; over tiles sums are fp64.
#pragma once

#include "fused_update.h"

#ifdef __CUDACC__
#define TBCM_THREAD __device__ __forceinline__
#else
#define TBCM_THREAD inline
#endif

namespace tbcm::came {

// A tile of a matrix is kSide x kSide elements, of all else kChunk elements one after the other, walked through as if
// they were as many rows. A warp has kRows rows, a thread of it one vector of each.
constexpr int kWarps = 8, kRows = 16;
constexpr int kThreads = kLanes * kWarps;
constexpr int kSide = kLanes * kVector;
static_assert(kSide == kWarps * kRows && kSide * kSide == kChunk);

constexpr int kNormThreads = 1024;  // that make one number of a step
constexpr int kTensorThreads = 512; // that make the averages or the scale of a tensor

// A parameter and its state; on the device, filled in once. A matrix is stored row by row; of all else `rows` is 0 and
// `cols` the number of elements, which have one order in all its parts.
struct Tensor {
  float *param, *momentum;
  float *shadow;                                        // the EMA's
  float *square;                                        // the second moment of what is no matrix, else null
  void *copy;                                           // the parameter in a narrower type, or null
  float *row, *col, *instability_row, *instability_col; // of a matrix, else null
  float *scratch;                                       // of a matrix: scratch_size(rows, cols) numbers
  int64_t rows, cols;
  int64_t first_tile; // in the list of all tiles
};

struct Hyper {
  double lr, beta1, beta2, beta3, eps1, eps2, threshold, weight_decay;
};

// What one update of one tensor needs beside the tensor; made on the device.
struct Step {
  const void *grad; // null: the parameter had no gradient, so CAME leaves it alone and the EMA alone goes on
  Hyper hyper;
  float scale; // of u, for its clipping
};

TBCM_INLINE int64_t pieces(int64_t of, int64_t size) { return (of + size - 1) / size; }

TBCM_INLINE int64_t tiles(int64_t rows, int64_t cols) {
  return rows ? pieces(rows, kSide) * pieces(cols, kSide) : pieces(cols, kChunk);
}

TBCM_INLINE int64_t numel(const Tensor &t) { return t.rows ? t.rows * t.cols : t.cols; }

// Scratch: factors of columns and of rows, then sums over the parts of rows and of columns that are in one tile.
TBCM_INLINE float *col_factors(const Tensor &t) { return t.scratch; }
TBCM_INLINE float *row_factors(const Tensor &t) { return t.scratch + t.cols; }
TBCM_INLINE float *row_sums(const Tensor &t, int64_t across) { return t.scratch + t.cols + t.rows * (1 + across); }
TBCM_INLINE float *col_sums(const Tensor &t, int64_t down) {
  return row_sums(t, pieces(t.cols, kSide)) + t.cols * down;
}
TBCM_INLINE int64_t scratch_size(int64_t rows, int64_t cols) {
  return rows ? cols + rows + rows * pieces(cols, kSide) + cols * pieces(rows, kSide) : 0;
}

// Factors: the averages of a matrix, with what they take in, and what they give. `square` multiplies the sums.
struct Averages {
  float *row, *col;
  double beta, square, eps, multiplier;
};

// r and c, whose factors turn a gradient that is not clipped yet into u.
TBCM_INLINE Averages second_moment(const Tensor &t, const Hyper &h, double clip) {
  return {t.row, t.col, h.beta2, clip * clip, h.eps1, clip};
}

// R and C, whose factors turn the momentum into lr times the update.
TBCM_INLINE Averages instability(const Tensor &t, const Hyper &h) {
  return {t.instability_row, t.instability_col, h.beta3, 1, h.eps2, h.lr};
}

// Number i of `length` takes in the mean over `over` squares, whose sum is in `parts` parts.
template <class Memory>
TBCM_THREAD float average(float *state, const float *sums, int64_t parts, int64_t length, int64_t over, int64_t i,
                          const Averages &a) {
  double sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += Memory::get(sums + part * length + i);
  const double mean = sum * a.square / static_cast<double>(over) + a.eps;
  const float value = static_cast<float>(a.beta * Memory::get(state + i) + (1 - a.beta) * mean);
  Memory::put(state + i, value);
  return value;
}

// One of kTensorThreads threads: its share of rows and columns. Returns the sum of its rows' averages.
template <class Memory> TBCM_THREAD double averages(const Tensor &t, const Averages &a, int thread) {
  const int64_t across = pieces(t.cols, kSide), down = pieces(t.rows, kSide);
  double sum = 0;
  for (int64_t i = thread; i < t.rows; i += kTensorThreads)
    sum += average<Memory>(a.row, row_sums(t, 0), across, t.rows, t.cols, i, a);
  for (int64_t i = thread; i < t.cols; i += kTensorThreads) {
    const double value = average<Memory>(a.col, col_sums(t, 0), down, t.cols, t.rows, i, a);
    Memory::put(col_factors(t) + i, static_cast<float>(1 / sqrt(value)));
  }
  return sum;
}

// The same thread, when it knows the sum of all.
template <class Memory>
TBCM_THREAD void finish_rows(const Tensor &t, const Averages &a, int thread, double sum) {
  const double mean = sum / static_cast<double>(t.rows);
  for (int64_t i = thread; i < t.rows; i += kTensorThreads)
    Memory::put(row_factors(t) + i, static_cast<float>(a.multiplier / sqrt(Memory::get(a.row + i) / mean)));
}

// A thread's share of the sum of `count` numbers in fp64.
template <class Memory>
TBCM_THREAD double share(const float *numbers, int64_t count, int thread, int threads) {
  double sum = 0;
  for (int64_t i = thread; i < count; i += threads) sum += Memory::get(numbers + i);
  return sum;
}

// With the sum of u^2: what makes the root mean square of u at most the threshold.
TBCM_INLINE float clipping(const Tensor &t, const Hyper &h, double sum) {
  const double excess = sqrt(sum / static_cast<double>(numel(t))) / h.threshold;
  return excess > 1 ? static_cast<float>(1 / excess) : 1.0f;
}

} // namespace tbcm::came

// In a step: tbcm_came_norm, then from the norm the clip factor and whether the step counts, tbcm_came_hyper for each
// group of parameters, tbcm_came_update.
extern "C" {
int tbcm_came_step_bytes();

// Tiles and numbers of scratch memory of a matrix, or of `cols` numbers that are none (rows = 0).
int64_t tbcm_came_tiles(int64_t rows, int64_t cols);
int64_t tbcm_came_scratch(int64_t rows, int64_t cols);

// Writes the L2 norm of all gradients to *norm, and notes the addresses of the gradients and sums of their squares.
// `grads`: host array of `n_tensors` device pointers, read before it returns; `totals`: room for `n_tiles` numbers.
int tbcm_came_norm(const tbcm::came::Tensor *tensors, tbcm::came::Step *steps, int n_tensors, const tbcm::Chunk *tiles,
                   int n_tiles, const void *const *grads, int grad_type, float *totals, float *norm, void *stream);

// Notes the numbers of tensors[first : first + count].
int tbcm_came_hyper(tbcm::came::Step *steps, int first, int count, double lr, double beta1, double beta2, double beta3,
                    double eps1, double eps2, double threshold, double weight_decay, void *stream);

// Updates all tiles with the gradients that tbcm_came_norm was told, times *clip, and writes copies of the type
// `copy_type` (Storage; those of null pointers are left out). Where *finite is false it does nothing.
int tbcm_came_update(const tbcm::came::Tensor *tensors, tbcm::came::Step *steps, int n_tensors,
                     const tbcm::Chunk *tiles, int n_tiles, int grad_type, int copy_type, float *totals,
                     const float *clip, const float *ema_weight, const uint8_t *finite, void *stream);
}
