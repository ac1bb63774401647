// Fused multi-tensor CAME + EMA + low-precision copy: eight launches a step beside those that note the gradients'
// addresses and the groups' numbers. Sums need no atomics, so that a step gives the same bits every time; whether the
// step counts (`finite`), the clip factor and the EMA's weight stay on the device; a step that does not count writes
// no weight and no state.
#pragma once

#include "came_passes.h"
#include "device.cuh"

namespace tbcm::came {
namespace {

// In each of these sums the host of the tests (tests/csrc) adds in the same order.
template <typename T> __device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = kLanes / 2; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// All threads get it; once in a kernel.
template <int threads, typename T> __device__ __forceinline__ T block_sum(T x) {
  __shared__ T of[threads / kLanes];
  x = warp_sum(x);
  if (threadIdx.x % kLanes == 0) of[threadIdx.x / kLanes] = x;
  __syncthreads();
  T sum = of[0];
  for (int warp = 1; warp < threads / kLanes; ++warp) sum += of[warp];
  return sum;
}

// What a tile has of the sums over rows: lane r keeps that over the warp's row r.
struct RowSums {
  const bool wanted;
  float mine = 0;

  __device__ __forceinline__ void add(int r, float x) {
    if (!wanted) return; // all threads of the warp or none
    x = warp_sum(x);
    if (threadIdx.x % kLanes == r) mine = x;
  }
};

__device__ __forceinline__ Place place(const Tensor &t, const Chunk &tile) {
  return place(t, tile.index, threadIdx.x / kLanes, threadIdx.x % kLanes);
}

__device__ __forceinline__ void store_sums(const Tensor &t, const Place &p, const RowSums &rows,
                                           const float (&cols)[kVector]) {
  __shared__ float of[kWarps][kSide];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
#pragma unroll
  for (int j = 0; j < kVector; ++j) of[warp][lane * kVector + j] = cols[j];
  __syncthreads();
  if (lane < kRows && p.row + lane < t.rows) Memory::put(row_sums(t, p.across) + p.row + lane, rows.mine);
  const int64_t col = static_cast<int64_t>(p.across) * kSide + threadIdx.x;
  if (threadIdx.x >= kSide || col >= t.cols) return;
  float sum = of[0][threadIdx.x];
  for (int other = 1; other < kWarps; ++other) sum += of[other][threadIdx.x];
  Memory::put(col_sums(t, p.down) + col, sum);
}

__global__ void grads_kernel(Step *steps, Addresses grads, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) steps[i].grad = grads.of[i];
}

__global__ void hyper_kernel(Step *steps, int count, Hyper hyper) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) steps[i].hyper = hyper;
}

__global__ void __launch_bounds__(kThreads)
    squares_kernel(const Tensor *tensors, const Step *steps, const Chunk *tiles, int grad_type, float *totals) {
  const Chunk tile = tiles[blockIdx.x];
  const Tensor t = tensors[tile.tensor];
  const Step step = steps[tile.tensor];
  const Work w = {t, step, place(t, tile), grad_type, 1.0f};
  RowSums rows = {t.rows != 0};
  float cols[kVector] = {};
  if (step.grad) squares<Memory>(w, rows, cols);
  if (step.grad && t.rows) store_sums(t, w.place, rows, cols);
  const float total = block_sum<kThreads>(sum(cols));
  if (threadIdx.x == 0) Memory::put(totals + blockIdx.x, total);
}

__global__ void __launch_bounds__(kNormThreads) norm_kernel(const float *totals, int count, float *norm) {
  const double sum = block_sum<kNormThreads>(share<Memory>(totals, count, threadIdx.x, kNormThreads));
  if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(sum));
}

__global__ void __launch_bounds__(kTensorThreads)
    factors_kernel(const Tensor *tensors, const Step *steps, bool first, const float *clip, const uint8_t *finite) {
  const Tensor t = tensors[blockIdx.x];
  const Step &step = steps[blockIdx.x];
  if (!*finite || !step.grad || !t.rows) return;
  const Averages a = first ? second_moment(t, step.hyper, *clip) : instability(t, step.hyper);
  const double sum = block_sum<kTensorThreads>(averages<Memory>(t, a, threadIdx.x));
  finish_rows<Memory>(t, a, threadIdx.x, sum);
}

__global__ void __launch_bounds__(kThreads)
    sizes_kernel(const Tensor *tensors, const Step *steps, const Chunk *tiles, int grad_type, float *totals,
                 const float *clip, const uint8_t *finite) {
  const Chunk tile = tiles[blockIdx.x];
  const Tensor t = tensors[tile.tensor];
  const Step step = steps[tile.tensor];
  if (!*finite || !step.grad) return;
  const float total = block_sum<kThreads>(sizes<Memory>({t, step, place(t, tile), grad_type, *clip}));
  if (threadIdx.x == 0) Memory::put(totals + blockIdx.x, total);
}

__global__ void __launch_bounds__(kTensorThreads)
    scale_kernel(const Tensor *tensors, Step *steps, const float *totals, const uint8_t *finite) {
  const Tensor t = tensors[blockIdx.x];
  Step &step = steps[blockIdx.x];
  if (!*finite || !step.grad || !numel(t)) return;
  const double mine = share<Memory>(totals + t.first_tile, tiles(t.rows, t.cols), threadIdx.x, kTensorThreads);
  const double sum = block_sum<kTensorThreads>(mine);
  if (threadIdx.x == 0) step.scale = clipping(t, step.hyper, sum);
}

__global__ void __launch_bounds__(kThreads)
    momentum_kernel(const Tensor *tensors, const Step *steps, const Chunk *tiles, int grad_type,
                    const uint8_t *finite) {
  const Chunk tile = tiles[blockIdx.x];
  const Tensor t = tensors[tile.tensor];
  const Step step = steps[tile.tensor];
  if (!*finite || !step.grad || !t.rows) return;
  const Work w = {t, step, place(t, tile), grad_type, 1.0f}; // the row factors have clipped
  RowSums rows = {true};
  float cols[kVector] = {};
  momentum<Memory>(w, rows, cols);
  store_sums(t, w.place, rows, cols);
}

__global__ void __launch_bounds__(kThreads)
    apply_kernel(const Tensor *tensors, const Step *steps, const Chunk *tiles, int grad_type, int copy_type,
                 const float *clip, const float *ema_weight, const uint8_t *finite) {
  if (!*finite) return;
  const Chunk tile = tiles[blockIdx.x];
  const Tensor t = tensors[tile.tensor];
  const Step step = steps[tile.tensor];
  apply<Memory>({t, step, place(t, tile), grad_type, *clip}, copy_type, *ema_weight);
}

} // namespace
} // namespace tbcm::came

using namespace tbcm;

int tbcm_came_step_bytes() { return sizeof(came::Step); }
int64_t tbcm_came_tiles(int64_t rows, int64_t cols) { return came::tiles(rows, cols); }
int64_t tbcm_came_scratch(int64_t rows, int64_t cols) { return came::scratch_size(rows, cols); }

int tbcm_came_norm(const came::Tensor *tensors, came::Step *steps, int n_tensors, const Chunk *tiles, int n_tiles,
                   const void *const *grads, int grad_type, float *totals, float *norm, void *stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const auto note = [=](const Addresses &addresses, int done, int now) {
    came::grads_kernel<<<(now + 63) / 64, 64, 0, on>>>(steps + done, addresses, now);
  };
  if (const int error = with_addresses(grads, n_tensors, note)) return error;
  if (n_tiles) // a launch of nothing is an error
    came::squares_kernel<<<n_tiles, came::kThreads, 0, on>>>(tensors, steps, tiles, grad_type, totals);
  came::norm_kernel<<<1, came::kNormThreads, 0, on>>>(totals, n_tiles, norm);
  return cudaGetLastError();
}

int tbcm_came_hyper(came::Step *steps, int first, int count, double lr, double beta1, double beta2, double beta3,
                    double eps1, double eps2, double threshold, double weight_decay, void *stream) {
  if (count == 0) return cudaSuccess;
  const came::Hyper hyper = {lr, beta1, beta2, beta3, eps1, eps2, threshold, weight_decay};
  came::hyper_kernel<<<(count + 63) / 64, 64, 0, static_cast<cudaStream_t>(stream)>>>(steps + first, count, hyper);
  return cudaGetLastError();
}

int tbcm_came_update(const came::Tensor *tensors, came::Step *steps, int n_tensors, const Chunk *tiles, int n_tiles,
                     int grad_type, int copy_type, float *totals, const float *clip, const float *ema_weight,
                     const uint8_t *finite, void *stream) {
  using namespace came;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (n_tiles == 0) return cudaSuccess;
  factors_kernel<<<n_tensors, kTensorThreads, 0, on>>>(tensors, steps, true, clip, finite);
  sizes_kernel<<<n_tiles, kThreads, 0, on>>>(tensors, steps, tiles, grad_type, totals, clip, finite);
  scale_kernel<<<n_tensors, kTensorThreads, 0, on>>>(tensors, steps, totals, finite);
  momentum_kernel<<<n_tiles, kThreads, 0, on>>>(tensors, steps, tiles, grad_type, finite);
  factors_kernel<<<n_tensors, kTensorThreads, 0, on>>>(tensors, steps, false, clip, finite);
  apply_kernel<<<n_tiles, kThreads, 0, on>>>(tensors, steps, tiles, grad_type, copy_type, clip, ema_weight, finite);
  return cudaGetLastError();
}
