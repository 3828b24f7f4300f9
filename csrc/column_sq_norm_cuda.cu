#include <cuda_fp16.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "column_sq_norm.h"
#include "cuda_utils.h"

// One launch: a thread block sums the squares of a chunk of rows of a strip of columns, its warps
// taking turns at the rows and its lanes holding 16 bytes of columns each. The last block of a
// strip to finish adds the chunks' sums in a fixed order, so the result has the same bits every
// time.

namespace owlore {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocksPerSm = 3;
// Rows that a thread has in flight, and rows after which float sums go to double.
constexpr int kUnroll = 4;
constexpr int kRun = 32;
// Sums of squares below this may have lost terms to underflow.
constexpr float kSmallestSum = 0x1p-80f;

// Rows of x after its leading dimensions were merged into two.
struct Rows {
  const void* data;
  const bool* mask;
  int64_t count;
  int64_t inner_count;
  int64_t outer_stride, inner_stride, column_stride;
  int64_t n;
  int64_t chunks;

  __device__ int64_t offset(int64_t t) const {
    return inner_count == count ? t * inner_stride
                                : t / inner_count * outer_stride + t % inner_count * inner_stride;
  }
  __device__ bool counts(int64_t t) const { return mask == nullptr || mask[t]; }
};

__device__ float to_float(Bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ float to_float(Fp16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ float to_float(float x) { return x; }
__device__ double to_float(double x) { return x; }

// kColumns neighbouring columns of one row, read at once.
template <typename T, int kColumns>
struct alignas(sizeof(T) * kColumns) Pack {
  T values[kColumns];
};

// Which columns of the rows seen so far held anything but zero: their bits, put together.
template <typename T, int kColumns>
struct Seen {
  Pack<T, kColumns> bits = {};

  __device__ void add(const Pack<T, kColumns>& row) {
    if constexpr (kColumns > 1) {
      auto& own = reinterpret_cast<uint4&>(bits);
      const auto& other = reinterpret_cast<const uint4&>(row);
      own = {own.x | other.x, own.y | other.y, own.z | other.z, own.w | other.w};
    } else if (to_float(row.values[0]) != 0) {
      bits = row;
    }
  }
  // Bits of several NaN-free numbers put together may look like a NaN, which is not zero either.
  __device__ bool nonzero(int c) const { return !(to_float(bits.values[c]) == 0); }
};

// Squares of one run of rows in double: for what float cannot sum.
template <typename T, int kColumns>
__device__ void add_run_in_double(const Rows& rows, int64_t column, int64_t first, int64_t last,
                                  double* sums) {
  const T* data = static_cast<const T*>(rows.data) + column * rows.column_stride;
  for (int64_t t = first; t < last; t += kWarps) {
    if (rows.counts(t)) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const double value = to_float(data[rows.offset(t) + c * rows.column_stride]);
        sums[c] += value * value;
      }
    }
  }
}

template <typename T, int kColumns>
__device__ void add_run(const Rows& rows, int64_t column, int64_t first, int64_t last,
                        double* sums) {
  if constexpr (std::is_same_v<T, double>) {
    add_run_in_double<T, kColumns>(rows, column, first, last, sums);
  } else {
    using Row = Pack<T, kColumns>;
    const T* data = static_cast<const T*>(rows.data) + column * rows.column_stride;
    float run[kColumns] = {};
    Seen<T, kColumns> seen;
    for (int64_t t = first; t < last; t += kUnroll * kWarps) {
      Row row[kUnroll] = {};
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t line = t + u * kWarps;
        if (line < last && rows.counts(line)) {
          row[u] = *reinterpret_cast<const Row*>(data + rows.offset(line));
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        seen.add(row[u]);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const float value = to_float(row[u].values[c]);
          run[c] = fmaf(value, value, run[c]);
        }
      }
    }
    bool odd = false;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      // Also true for NaN, which double arithmetic passes on.
      odd |= !(run[c] < HUGE_VALF) || (seen.nonzero(c) && run[c] < kSmallestSum);
    }
    if (odd) {
      add_run_in_double<T, kColumns>(rows, column, first, last, sums);
      return;
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      sums[c] += run[c];
    }
  }
}

template <typename A>
__device__ void add_to(void* acc, int64_t index, double sum) {
  static_cast<A*>(acc)[index] += static_cast<A>(sum);
}

template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    column_sq_norm_kernel(const __grid_constant__ Rows rows, double* partial, unsigned* finished,
                          void* acc, int64_t acc_stride, bool acc_is_double) {
  constexpr int kWidth = 32 * kColumns;
  __shared__ double shared[kWarps][kWidth];
  __shared__ bool is_last;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t strip = blockIdx.x * static_cast<int64_t>(kWidth);
  const int64_t column = strip + lane * kColumns;
  const int64_t begin = rows.count * blockIdx.y / gridDim.y;
  const int64_t end = rows.count * (blockIdx.y + 1) / gridDim.y;

  double sums[kColumns] = {};
  if (column < rows.n) {
    for (int64_t first = begin + warp; first < end; first += kRun * kWarps) {
      add_run<T, kColumns>(rows, column, first, min(first + kRun * kWarps, end), sums);
    }
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    shared[warp][lane * kColumns + c] = sums[c];
  }
  __syncthreads();

  const int64_t mine = strip + threadIdx.x;
  const bool has_column = threadIdx.x < kWidth && mine < rows.n;
  double sum = 0;
  if (has_column) {
    for (int w = 0; w < kWarps; ++w) {
      sum += shared[w][threadIdx.x];
    }
    partial[blockIdx.y * rows.n + mine] = sum;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(&finished[blockIdx.x], 1u) == gridDim.y - 1;
  }
  __syncthreads();
  if (!is_last || !has_column) {
    return;
  }
  __threadfence();
  sum = 0;
#pragma unroll 8
  for (unsigned chunk = 0; chunk < gridDim.y; ++chunk) {
    sum += __ldcg(&partial[chunk * rows.n + mine]);
  }
  if (acc_is_double) {
    add_to<double>(acc, mine * acc_stride, sum);
  } else {
    add_to<float>(acc, mine * acc_stride, sum);
  }
}

// Merges the leading dimensions of x; true if two remain at most.
bool merge_rows(const Tensor& x, Rows* rows) {
  int64_t sizes[2] = {1, 1};
  int64_t strides[2] = {0, 0};
  int found = 0;
  // From the last leading dimension to the first; a dimension joins the one behind it where its
  // stride allows.
  for (int64_t d = x.dim() - 2; d >= 0; --d) {
    if (x.size(d) == 1) {
      continue;
    }
    if (found > 0 && x.stride(d) == strides[found - 1] * sizes[found - 1]) {
      sizes[found - 1] *= x.size(d);
      continue;
    }
    if (found == 2) {
      return false;
    }
    sizes[found] = x.size(d);
    strides[found++] = x.stride(d);
  }
  rows->inner_count = sizes[0];
  rows->inner_stride = strides[0];
  rows->outer_stride = strides[1];
  rows->count = sizes[0] * sizes[1];
  return true;
}

template <typename T, int kColumns>
void launch(Rows rows, const Tensor& acc, int32_t device) {
  const int64_t strips = ceil_div(rows.n, 32 * kColumns);
  // Enough blocks to fill the device once, each with a run of rows for every warp at least.
  const int64_t fill = std::max<int64_t>(1, multiprocessors(device) * kBlocksPerSm / strips);
  const int64_t chunks = std::min<int64_t>({fill, ceil_div(rows.count, kUnroll * kWarps), 65535});
  const int64_t partial_bytes = chunks * rows.n * static_cast<int64_t>(sizeof(double));
  const Tensor memory =
      scratch(acc, partial_bytes + strips * static_cast<int64_t>(sizeof(unsigned)));
  char* base = static_cast<char*>(memory.mutable_data_ptr());
  auto* finished = reinterpret_cast<unsigned*>(base + partial_bytes);
  const cudaStream_t stream = current_stream(device);
  STD_CUDA_CHECK(cudaMemsetAsync(finished, 0, strips * sizeof(unsigned), stream));
  const dim3 grid(static_cast<unsigned>(strips), static_cast<unsigned>(chunks));
  column_sq_norm_kernel<T, kColumns><<<grid, kThreads, 0, stream>>>(
      rows, reinterpret_cast<double*>(base), finished, acc.mutable_data_ptr(), acc.stride(0),
      acc.scalar_type() == ScalarType::Double);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void column_sq_norm_cuda(Tensor acc, Tensor x, std::optional<Tensor> mask) {
  check_column_sq_norm(acc, x, mask);
  if (acc.numel() == 0 || x.numel() == 0) {
    return;
  }
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Rows rows{};
  if (!merge_rows(x, &rows)) {
    x = torch::stable::contiguous(x);
    merge_rows(x, &rows);
  }
  std::optional<Tensor> dense_mask;
  if (mask.has_value()) {
    dense_mask = torch::stable::contiguous(*mask);
    rows.mask = static_cast<const bool*>(dense_mask->const_data_ptr());
  }
  rows.data = x.const_data_ptr();
  rows.n = acc.size(0);
  rows.column_stride = x.stride(x.dim() - 1);
  const int64_t item_bytes = static_cast<int64_t>(x.element_size());
  const bool vectorised = rows.column_stride == 1 && rows.n % (16 / item_bytes) == 0 &&
                          is_vector_aligned(rows.data, rows.inner_stride * item_bytes) &&
                          rows.outer_stride * item_bytes % 16 == 0;
  dispatch_float(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    if (vectorised) {
      launch<T, 16 / sizeof(T)>(rows, acc, device);
    } else {
      launch<T, 1>(rows, acc, device);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(owlore, CUDA, m) {
  m.impl("column_sq_norm_", TORCH_BOX(&column_sq_norm_cuda));
}

}  // namespace owlore
