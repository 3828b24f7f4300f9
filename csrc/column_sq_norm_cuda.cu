#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "column_sq_norm.h"
#include "cuda_utils.h"

// One launch: a thread block sums the squares of a chunk of rows of a strip of columns, teams of
// its threads taking turns at the rows and each thread holding 16 bytes of columns. The chunks'
// sums of a strip are then added in a fixed order, so the result has the same bits every time:
// where the blocks of a strip form a cluster by its first block, in shared memory, else by the last
// block to finish, through global memory.

namespace owlore {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 3;
// Rows that a thread has in flight, and rows after which its float sums go to double.
constexpr int kUnroll = 4;
constexpr int kRun = 32;
// The most blocks that every device takes in a cluster.
constexpr unsigned kMaxCluster = 8;
// Threads that hold one row of a strip. Long rows are read faster, short ones make enough strips
// for clusters to fill the device.
constexpr int kTeam = 32;
constexpr int kClusterTeam = 8;
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
template <typename T, int kColumns, int kTeams>
__device__ void add_run_in_double(const Rows& rows, int64_t column, int64_t first, int64_t last,
                                  double* sums) {
  const T* data = static_cast<const T*>(rows.data) + column * rows.column_stride;
#pragma unroll(std::is_same_v<T, double> ? 4 : 1)
  for (int64_t t = first; t < last; t += kTeams) {
    if (rows.counts(t)) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const double value = to_float(data[rows.offset(t) + c * rows.column_stride]);
        sums[c] += value * value;
      }
    }
  }
}

template <typename T, int kColumns, int kTeams>
__device__ void add_run(const Rows& rows, int64_t column, int64_t first, int64_t last,
                        double* sums) {
  if constexpr (std::is_same_v<T, double>) {
    add_run_in_double<T, kColumns, kTeams>(rows, column, first, last, sums);
  } else {
    using Row = Pack<T, kColumns>;
    const T* data = static_cast<const T*>(rows.data) + column * rows.column_stride;
    float run[kColumns] = {};
    Seen<T, kColumns> seen;
    for (int64_t t = first; t < last; t += kUnroll * kTeams) {
      Row row[kUnroll] = {};
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t line = t + u * kTeams;
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
      add_run_in_double<T, kColumns, kTeams>(rows, column, first, last, sums);
      return;
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      sums[c] += run[c];
    }
  }
}

// One thread's share of a thread block's sums: those of one column of the strip, in an order of
// columns that keeps threads out of each other's banks of shared memory.
template <typename T, int kColumns, int kLanes>
struct Strip {
  static constexpr int kTeams = kThreads / kLanes;
  static constexpr int kWidth = kLanes * kColumns;

  int64_t begin = blockIdx.x * static_cast<int64_t>(kWidth);
  int slot = threadIdx.x;
  int64_t column = begin + slot % kLanes * kColumns + slot / kLanes;
  bool has_column;

  __device__ explicit Strip(int64_t n) : has_column(slot < kWidth && column < n) {}

  __device__ double sum(const Rows& rows, double (&shared)[kTeams][kWidth]) const {
    const int lane = threadIdx.x % kLanes;
    const int team = threadIdx.x / kLanes;
    const int64_t own = begin + lane * kColumns;
    const int64_t first_row = rows.count * blockIdx.y / gridDim.y;
    const int64_t last_row = rows.count * (blockIdx.y + 1) / gridDim.y;
    constexpr int kStep = kRun * kTeams;
    double sums[kColumns] = {};
    if (own < rows.n) {
      for (int64_t t = first_row + team; t < last_row; t += kStep) {
        add_run<T, kColumns, kTeams>(rows, own, t, min(t + kStep, last_row), sums);
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      shared[team][c * kLanes + lane] = sums[c];
    }
    __syncthreads();
    double total = 0;
    if (has_column) {
      for (int w = 0; w < kTeams; ++w) {
        total += shared[w][slot];
      }
    }
    return total;
  }
};

// Where the sums go.
struct Accumulator {
  void* data;
  int64_t stride;
  bool is_double;

  __device__ void add(int64_t index, double sum) const {
    if (is_double) {
      static_cast<double*>(data)[index * stride] += sum;
    } else {
      static_cast<float*>(data)[index * stride] += static_cast<float>(sum);
    }
  }
};

template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    column_sq_norm_kernel(const __grid_constant__ Rows rows, double* partial, unsigned* finished,
                          const Accumulator acc) {
  using OwnStrip = Strip<T, kColumns, kTeam>;
  __shared__ double shared[OwnStrip::kTeams][OwnStrip::kWidth];
  __shared__ bool is_last;
  const OwnStrip strip(rows.n);
  double sum = strip.sum(rows, shared);
  double* own = partial + strip.begin + strip.slot;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * OwnStrip::kWidth;
  if (strip.has_column) {
    own[blockIdx.y * stride] = sum;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(&finished[blockIdx.x], 1u) == gridDim.y - 1;
  }
  __syncthreads();
  if (!is_last || !strip.has_column) {
    return;
  }
  __threadfence();
  sum = 0;
#pragma unroll 8
  for (unsigned chunk = 0; chunk < gridDim.y; ++chunk) {
    sum += __ldcg(&own[chunk * stride]);
  }
  acc.add(strip.column, sum);
}

// The chunks of a strip are the blocks of a cluster. Compute capability 9.0 and later.
template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    column_sq_norm_cluster_kernel(const __grid_constant__ Rows rows, const Accumulator acc) {
#if __CUDA_ARCH__ >= 900
  using OwnStrip = Strip<T, kColumns, kClusterTeam>;
  __shared__ double shared[OwnStrip::kTeams][OwnStrip::kWidth];
  __shared__ double of_chunks[kMaxCluster][OwnStrip::kWidth];
  const auto cluster = cooperative_groups::this_cluster();
  // The launch does not wait for what is ahead in the stream, so this does.
  cudaGridDependencySynchronize();
  // A block's shared memory is there for others only once it runs.
  cluster.barrier_arrive();
  const OwnStrip strip(rows.n);
  double sum = strip.sum(rows, shared);
  cluster.barrier_wait();
  if (strip.has_column) {
    *cluster.map_shared_rank(&of_chunks[blockIdx.y][strip.slot], 0) = sum;
  }
  cluster.barrier_arrive();
  if (blockIdx.y > 0) {
    return;
  }
  cluster.barrier_wait();
  if (!strip.has_column) {
    return;
  }
  sum = 0;
  for (unsigned chunk = 0; chunk < gridDim.y; ++chunk) {
    sum += of_chunks[chunk][strip.slot];
  }
  acc.add(strip.column, sum);
#endif
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

Accumulator accumulator(const Tensor& acc) {
  return {acc.mutable_data_ptr(), acc.stride(0), acc.scalar_type() == ScalarType::Double};
}

// Whether the kernel was compiled with clusters: code for older devices can run on newer ones.
bool has_clusters(const void* kernel, int32_t device) {
  int major = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (major < 9) {
    return false;
  }
  cudaFuncAttributes attributes{};
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion >= 90;
}

// Launches one cluster per strip, all at once on the device; false if they would not fill it.
template <typename T, int kColumns>
bool launch_clusters(const Rows& rows, const Tensor& acc, int32_t device) {
  using OwnStrip = Strip<T, kColumns, kClusterTeam>;
  const auto kernel = column_sq_norm_cluster_kernel<T, kColumns>;
  // With a mask the other kernel's longer rows are faster.
  if (rows.mask != nullptr || !has_clusters(reinterpret_cast<const void*>(kernel), device)) {
    return false;
  }
  const int64_t slots = static_cast<int64_t>(multiprocessors(device)) * kBlocksPerSm;
  const int64_t strips = ceil_div(rows.n, OwnStrip::kWidth);
  int64_t chunks = std::min<int64_t>(
      {kMaxCluster, slots / strips, ceil_div(rows.count, kUnroll * OwnStrip::kTeams)});
  for (; chunks > 0; --chunks) {
    const bool fills = strips * chunks * 8 >= slots * 5;
    const bool is_short = rows.count <= chunks * OwnStrip::kTeams * kRun;
    if (!fills && !is_short) {
      return false;
    }
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = 1;
    attributes[0].val.clusterDim.y = static_cast<unsigned>(chunks);
    attributes[0].val.clusterDim.z = 1;
    // Blocks may start while the kernel ahead in the stream still ends.
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(strips), static_cast<unsigned>(chunks));
    config.blockDim = dim3(kThreads);
    config.stream = current_stream(device);
    config.attrs = attributes;
    config.numAttrs = 2;
    int clusters = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    if (clusters >= strips) {
      STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, rows, accumulator(acc)));
      return true;
    }
  }
  return false;
}

template <typename T, int kColumns>
void launch(const Rows& rows, const Tensor& acc, int32_t device) {
  using OwnStrip = Strip<T, kColumns, kTeam>;
  const int64_t strips = ceil_div(rows.n, OwnStrip::kWidth);
  // Enough blocks to fill the device once, each with a run of rows for every team at least.
  const int64_t fill = std::max<int64_t>(1, multiprocessors(device) * kBlocksPerSm / strips);
  const int64_t chunks =
      std::min<int64_t>({fill, ceil_div(rows.count, kUnroll * OwnStrip::kTeams), 65535});
  const int64_t partial_bytes =
      chunks * strips * OwnStrip::kWidth * static_cast<int64_t>(sizeof(double));
  const Tensor memory =
      scratch(acc, partial_bytes + strips * static_cast<int64_t>(sizeof(unsigned)));
  char* base = static_cast<char*>(memory.mutable_data_ptr());
  auto* finished = reinterpret_cast<unsigned*>(base + partial_bytes);
  const cudaStream_t stream = current_stream(device);
  STD_CUDA_CHECK(cudaMemsetAsync(finished, 0, strips * sizeof(unsigned), stream));
  const dim3 grid(static_cast<unsigned>(strips), static_cast<unsigned>(chunks));
  column_sq_norm_kernel<T, kColumns><<<grid, kThreads, 0, stream>>>(
      rows, reinterpret_cast<double*>(base), finished, accumulator(acc));
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
      constexpr int kColumns = 16 / sizeof(T);
      if (!launch_clusters<T, kColumns>(rows, acc, device)) {
        launch<T, kColumns>(rows, acc, device);
      }
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
