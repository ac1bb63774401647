// The library: both optimisers and what Python asks of it. One source, so that the headers are read once.
#include "adamw.cuh"
#include "came.cuh"

int tbcm_fused_version() { return tbcm::kVersion; }
int tbcm_fused_chunk() { return tbcm::kChunk; }
const char *tbcm_fused_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int tbcm_fused_check() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, tbcm::adamw::begin_kernel);
  return error == cudaSuccess ? cudaSuccess : (cudaGetLastError(), error); // a launch must not find the error later
}
