#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "common.h"

namespace owlore {

// The stream that PyTorch is using on this device.
inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  // The stable headers' own check of an error code has another name in torch 2.11 than in 2.13.
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream) == 0,
                  "no current CUDA stream on device ", device_index);
  return static_cast<cudaStream_t>(stream);
}

inline int multiprocessors(int32_t device_index) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_index));
  return count;
}

// Uninitialised memory on the device of like.
inline Tensor scratch(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

// Whether rows of this stride starting here can be read 16 bytes at a time.
inline bool is_vector_aligned(const void* data, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_bytes % 16 == 0;
}

__device__ inline double block_sum(double value, double* shared) {
  // A fixed tree, so the same values give the same bits.
  shared[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    __syncthreads();
  }
  const double sum = shared[0];
  __syncthreads();
  return sum;
}

}  // namespace owlore
