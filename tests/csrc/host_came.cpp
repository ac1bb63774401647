// csrc/came.cuh for a CPU: the same passes (csrc/came_passes.h), with loops for threads and sums in the order of the
// kernels' shuffles.
#include <vector>

#include "came_passes.h"
#include "host.h"

using namespace tbcm;
using namespace tbcm::came;

namespace {

// As warp_sum: every lane adds what the lane has whose number differs in one bit, the highest first.
template <typename T> T warp_sum(const T *of) {
  T x[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = of[lane];
  for (int offset = kLanes / 2; offset; offset /= 2)
    for (int lane = 0; lane < offset; ++lane) x[lane] += x[lane + offset];
  return x[0];
}

template <typename T> T block_sum(const std::vector<T> &of) {
  T sum = warp_sum(&of[0]);
  for (size_t warp = 1; warp < of.size() / kLanes; ++warp) sum += warp_sum(&of[warp * kLanes]);
  return sum;
}

struct Rows {
  float of[kRows] = {};
  void add(int r, float x) { of[r] = x; }
};

struct Thread {
  Rows rows;
  float cols[kVector] = {};
};

Work work(const Tensor &t, const Step &s, int tile, int thread, int grad_type, float clip) {
  return {t, s, place(t, tile, thread / kLanes, thread % kLanes), grad_type, clip};
}

void store_sums(const Tensor &t, int tile, const std::vector<Thread> &threads) {
  const Place p = place(t, tile, 0, 0);
  for (int row = 0; row < kSide && p.row + row < t.rows; ++row) {
    float parts[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) parts[lane] = threads[row / kRows * kLanes + lane].rows.of[row % kRows];
    Memory::put(row_sums(t, p.across) + p.row + row, warp_sum(parts));
  }
  for (int col = 0; col < kSide && p.col + col < t.cols; ++col) {
    float sum = threads[col / kVector].cols[col % kVector];
    for (int warp = 1; warp < kWarps; ++warp) sum += threads[warp * kLanes + col / kVector].cols[col % kVector];
    Memory::put(col_sums(t, p.down) + p.col + col, sum);
  }
}

float squares_of_tile(const Tensor &t, const Step &s, int tile, int grad_type) {
  std::vector<Thread> threads(kThreads);
  std::vector<float> totals(kThreads);
  if (!s.grad) return 0;
  for (int i = 0; i < kThreads; ++i) {
    squares<Memory>(work(t, s, tile, i, grad_type, 1), threads[i].rows, threads[i].cols);
    totals[i] = sum(threads[i].cols);
  }
  if (t.rows) store_sums(t, tile, threads);
  return block_sum(totals);
}

float sizes_of_tile(const Tensor &t, const Step &s, int tile, int grad_type, float clip) {
  std::vector<float> totals(kThreads);
  for (int i = 0; i < kThreads; ++i) totals[i] = sizes<Memory>(work(t, s, tile, i, grad_type, clip));
  return block_sum(totals);
}

void momentum_of_tile(const Tensor &t, const Step &s, int tile, int grad_type) {
  std::vector<Thread> threads(kThreads);
  for (int i = 0; i < kThreads; ++i)
    momentum<Memory>(work(t, s, tile, i, grad_type, 1), threads[i].rows, threads[i].cols);
  store_sums(t, tile, threads);
}

void factors(const Tensor &t, const Averages &a) {
  std::vector<double> sums(kTensorThreads);
  for (int i = 0; i < kTensorThreads; ++i) sums[i] = averages<Memory>(t, a, i);
  const double sum = block_sum(sums);
  for (int i = 0; i < kTensorThreads; ++i) finish_rows<Memory>(t, a, i, sum);
}

double sum_of(const float *numbers, int64_t count, int threads) {
  std::vector<double> shares(threads);
  for (int i = 0; i < threads; ++i) shares[i] = share<Memory>(numbers, count, i, threads);
  return block_sum(shares);
}

} // namespace

int tbcm_came_step_bytes() { return sizeof(Step); }
int64_t tbcm_came_tiles(int64_t rows, int64_t cols) { return tiles(rows, cols); }
int64_t tbcm_came_scratch(int64_t rows, int64_t cols) { return scratch_size(rows, cols); }

int tbcm_came_norm(const Tensor *tensors, Step *steps, int n_tensors, const Chunk *tiles, int n_tiles,
                   const void *const *grads, int grad_type, float *totals, float *norm, void *) {
  for (int i = 0; i < n_tensors; ++i) steps[i].grad = grads[i];
  for (int i = 0; i < n_tiles; ++i) {
    const int tensor = tiles[i].tensor;
    Memory::put(totals + i, squares_of_tile(tensors[tensor], steps[tensor], tiles[i].index, grad_type));
  }
  *norm = static_cast<float>(sqrt(sum_of(totals, n_tiles, kNormThreads)));
  return 0;
}

int tbcm_came_hyper(Step *steps, int first, int count, double lr, double beta1, double beta2, double beta3, double eps1,
                    double eps2, double threshold, double weight_decay, void *) {
  for (int i = first; i < first + count; ++i)
    steps[i].hyper = {lr, beta1, beta2, beta3, eps1, eps2, threshold, weight_decay};
  return 0;
}

int tbcm_came_update(const Tensor *tensors, Step *steps, int n_tensors, const Chunk *chunks, int n_tiles, int grad_type,
                     int copy_type, float *totals, const float *clip, const float *ema_weight, const uint8_t *finite,
                     void *) {
  if (!*finite) return 0;
  for (int i = 0; i < n_tensors; ++i)
    if (steps[i].grad && tensors[i].rows) factors(tensors[i], second_moment(tensors[i], steps[i].hyper, *clip));
  for (int i = 0; i < n_tiles; ++i)
    if (const Step &s = steps[chunks[i].tensor]; s.grad)
      Memory::put(totals + i, sizes_of_tile(tensors[chunks[i].tensor], s, chunks[i].index, grad_type, *clip));
  for (int i = 0; i < n_tensors; ++i) {
    const Tensor &t = tensors[i];
    if (!steps[i].grad || !numel(t)) continue;
    const double sum = sum_of(totals + t.first_tile, tiles(t.rows, t.cols), kTensorThreads);
    steps[i].scale = clipping(t, steps[i].hyper, sum);
  }
  for (int i = 0; i < n_tiles; ++i)
    if (const Step &s = steps[chunks[i].tensor]; s.grad && tensors[chunks[i].tensor].rows)
      momentum_of_tile(tensors[chunks[i].tensor], s, chunks[i].index, grad_type);
  for (int i = 0; i < n_tensors; ++i)
    if (steps[i].grad && tensors[i].rows) factors(tensors[i], instability(tensors[i], steps[i].hyper));
  for (int i = 0; i < n_tiles; ++i)
    for (int thread = 0; thread < kThreads; ++thread) {
      const int tensor = chunks[i].tensor;
      apply<Memory>(work(tensors[tensor], steps[tensor], chunks[i].index, thread, grad_type, *clip), copy_type,
                    *ema_weight);
    }
  return 0;
}
