#include <cuda_fp16.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cuda_utils.h"
#include "outlier_counts.h"

// Two streaming passes over the weights of a block, sum then count, and a small kernel between:
//   sum_kernel     partial sums of |W_ij| * norm_j, one per thread block
//   bounds_kernel  the mean, and for every column j and threshold q the largest value t of W's
//   dtype
//                  with t <= tau_q * mean / norm_j, so that A_ij > tau_q * mean is |W_ij| > t
//   count_kernel   compares the stored bits with those bounds: exact, and two 16-bit weights in one
//                  instruction
// Inputs for which the shortcut does not hold (a NaN, an infinity, a value near the end of the
// range, a negative norm) raise a flag on the device, and count_kernel computes the products in
// double instead. Layouts that cannot be read 16 bytes at a time are always done so.

namespace owlore {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerSm = 6;
// Thresholds of one pass over the weights.
constexpr int kTaus = 8;
// Matrices of one launch: their table must fit the 4 KiB of kernel parameters.
constexpr int kMatrices = 32;
// Rows that a thread has in flight. Work is dealt out in units of so many rows.
constexpr int kUnit = 4;
// Rows after which float sums go to double, and half-precision counts to integers.
constexpr int kSumRows = 64;
constexpr int kCountRows = 256;
constexpr int kBoundsThreads = 256;
// Finite values up to here have bit patterns that are finite halves too.
constexpr float kLargestPattern = 0x1p120f;
constexpr unsigned kNeverPattern = 0x7bff;

enum Dtype : int { kBf16, kFp16, kFp32, kFp64 };

// One weight, seen as lines along its contiguous side. `inner` runs along a line.
struct Matrix {
  const void* data;
  const void* norm;
  int64_t inner, outer;
  int64_t inner_stride, outer_stride, norm_stride;
  int64_t first_unit;
  int64_t units_down;
  int64_t first_column;   // in the list of all columns that have bounds
  int64_t bounds_offset;  // bytes
  int row;                // of counts
  int width;              // inner elements of a strip
  int dtype;
  bool norm_is_double;
  bool norm_along_inner;
  bool vectorised;
};

struct Work {
  Matrix matrices[kMatrices];
  int n_matrices;
  int64_t n_units;
  int64_t n_columns;
};

struct Taus {
  double values[kTaus];
  int count;
};
static_assert(sizeof(Work) + sizeof(Taus) < 4000, "kernel parameters");

// Consecutive lines of one strip of one matrix.
struct Segment {
  int matrix;
  int64_t strip;
  int64_t begin, end;
};

// The last segment before unit `end`, no longer than back to unit `begin`.
__device__ Segment last_segment(const Work& work, int64_t begin, int64_t* end) {
  int k = work.n_matrices - 1;
  while (work.matrices[k].first_unit >= *end) {
    --k;
  }
  const Matrix& M = work.matrices[k];
  const int64_t last = *end - 1 - M.first_unit;
  const int64_t strip = last / M.units_down;
  const int64_t down = last % M.units_down;
  const int64_t units = min(down + 1, *end - max(begin, M.first_unit));
  *end -= units;
  return {k, strip, (down + 1 - units) * kUnit, min((down + 1) * kUnit, M.outer)};
}

__device__ int64_t first_unit_of_block(const Work& work, int64_t block) {
  return work.n_units * block / gridDim.x;
}

__device__ double norm_at(const Matrix& M, int64_t j) {
  return M.norm_is_double
             ? static_cast<const double*>(M.norm)[j * M.norm_stride]
             : static_cast<double>(static_cast<const float*>(M.norm)[j * M.norm_stride]);
}

__device__ double magnitude_at(const Matrix& M, int64_t line, int64_t i) {
  const int64_t offset = line * M.outer_stride + i * M.inner_stride;
  switch (M.dtype) {
    case kBf16: {
      const unsigned bits = static_cast<const uint16_t*>(M.data)[offset];
      return __uint_as_float((bits & 0x7fffu) << 16);
    }
    case kFp16:
      return __half2float(__habs(static_cast<const __half*>(M.data)[offset]));
    case kFp32:
      return fabsf(static_cast<const float*>(M.data)[offset]);
    default:
      return fabs(static_cast<const double*>(M.data)[offset]);
  }
}

// Calls body with every A_ij of the segment that this thread owns, in double.
template <typename Body>
__device__ void for_each_score(const Matrix& M, const Segment& segment, const Body& body) {
  for (int64_t line = segment.begin; line < segment.end; ++line) {
    for (int v = threadIdx.x; v < M.width; v += kThreads) {
      const int64_t i = segment.strip * M.width + v;
      if (i < M.inner) {
        body(magnitude_at(M, line, i) * norm_at(M, M.norm_along_inner ? i : line));
      }
    }
  }
}

// 16 bytes of a weight as magnitudes in float. kWidth of them.
template <int kDtype>
struct Vector {
  static constexpr int kWidth = kDtype == kFp32 ? 4 : 8;

  __device__ static void add(uint4 packed, float* sums) {
    const unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      if constexpr (kDtype == kFp32) {
        sums[p] += fabsf(__uint_as_float(words[p]));
      } else if constexpr (kDtype == kBf16) {
        sums[2 * p] += fabsf(__uint_as_float(words[p] << 16));
        sums[2 * p + 1] += fabsf(__uint_as_float(words[p] & 0xffff0000u));
      } else {
        const __half2 pair = reinterpret_cast<const __half2&>(words[p]);
        sums[2 * p] += fabsf(__low2float(pair));
        sums[2 * p + 1] += fabsf(__high2float(pair));
      }
    }
  }
};

__device__ const uint4* vector_at(const Matrix& M, const Segment& segment, int64_t line,
                                  int item_bytes, int64_t vector) {
  const char* row = static_cast<const char*>(M.data) + line * M.outer_stride * item_bytes;
  return reinterpret_cast<const uint4*>(row) + vector;
}

// The segment's sum of this thread's columns. `odd` is set where the float sums cannot be trusted.
template <int kDtype>
__device__ double sum_segment(const Matrix& M, const Segment& segment, bool* odd) {
  constexpr int kWidth = Vector<kDtype>::kWidth;
  const int64_t vector = segment.strip * kThreads + threadIdx.x;
  if (vector >= M.inner / kWidth) {
    return 0;
  }
  const int64_t stride = M.outer_stride / kWidth;
  double columns[kWidth] = {};
  for (int64_t first = segment.begin; first < segment.end; first += kSumRows) {
    const int64_t last = min(first + kSumRows, segment.end);
    const uint4* source = vector_at(M, segment, first, 16 / kWidth, vector);
    float sums[kWidth] = {};
    int64_t line = first;
    for (; line + kUnit <= last; line += kUnit, source += kUnit * stride) {
      uint4 packed[kUnit];
#pragma unroll
      for (int u = 0; u < kUnit; ++u) {
        packed[u] = __ldg(source + u * stride);
      }
#pragma unroll
      for (int u = 0; u < kUnit; ++u) {
        Vector<kDtype>::add(packed[u], sums);
      }
    }
    for (; line < last; ++line, source += stride) {
      Vector<kDtype>::add(__ldg(source), sums);
    }
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      // Also true for NaN.
      *odd |= !(sums[c] < kLargestPattern);
      columns[c] += sums[c];
    }
  }
  double sum = 0;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    const double norm = norm_at(M, vector * kWidth + c);
    *odd |= !(norm >= 0 && norm < HUGE_VAL);
    sum += columns[c] * norm;
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    sum_kernel(const __grid_constant__ Work work, double* partial, int* partial_odd) {
  __shared__ double shared[kThreads];
  const int64_t begin = first_unit_of_block(work, blockIdx.x);
  int64_t end = first_unit_of_block(work, blockIdx.x + 1);
  double total = 0;
  bool any_odd = false;
  while (end > begin) {
    const Segment segment = last_segment(work, begin, &end);
    const Matrix& M = work.matrices[segment.matrix];
    bool odd = false;
    double sum = 0;
    if (M.vectorised) {
      sum = M.dtype == kBf16   ? sum_segment<kBf16>(M, segment, &odd)
            : M.dtype == kFp16 ? sum_segment<kFp16>(M, segment, &odd)
                               : sum_segment<kFp32>(M, segment, &odd);
    }
    odd = __syncthreads_or(odd);
    if (odd || !M.vectorised) {
      sum = 0;
      for_each_score(M, segment, [&](double A) { sum += A; });
    }
    any_odd |= odd;
    total += sum;
  }
  total = block_sum(total, shared);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = total;
    partial_odd[blockIdx.x] = any_odd;
  }
}

// What all blocks of count_kernel need to know.
struct Summary {
  double mean;
  int odd;
};

__device__ unsigned bound_pattern(int dtype, double bound) {
  const float below = __double2float_rd(bound);
  const unsigned pattern =
      dtype == kBf16 ? __float_as_uint(below) >> 16 : __half_as_ushort(__float2half_rd(below));
  return min(pattern, kNeverPattern);
}

__global__ void __launch_bounds__(kBoundsThreads)
    bounds_kernel(const __grid_constant__ Work work, const __grid_constant__ Taus taus,
                  const double* partial, const int* partial_odd, int n_partial, double entries,
                  char* bounds, Summary* summary, double* mean_out) {
  __shared__ double shared[kBoundsThreads];
  double sum = 0;
  bool odd = false;
  for (int i = threadIdx.x; i < n_partial; i += kBoundsThreads) {
    sum += partial[i];
    odd |= partial_odd[i] != 0;
  }
  const double mean = block_sum(sum, shared) / entries;
  odd = __syncthreads_or(odd) || !(mean < HUGE_VAL);
  for (int q = 0; q < taus.count; ++q) {
    odd |= !(taus.values[q] * mean >= 0);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *summary = {mean, odd};
    *mean_out = mean;
  }

  const int64_t column = static_cast<int64_t>(blockIdx.x) * kBoundsThreads + threadIdx.x;
  if (column >= work.n_columns) {
    return;
  }
  int k = 0;
  while (!work.matrices[k].vectorised ||
         column >= work.matrices[k].first_column + work.matrices[k].inner) {
    ++k;
  }
  const Matrix& M = work.matrices[k];
  const int64_t j = column - M.first_column;
  const double norm = norm_at(M, j);
  for (int q = 0; q < kTaus; ++q) {
    // A column without activations has A = 0, which no bound of 0 or more is below.
    const double bound = q < taus.count && norm > 0 ? fabs(taus.values[q] * mean) / norm : HUGE_VAL;
    char* place = bounds + M.bounds_offset;
    if (M.dtype == kFp32) {
      reinterpret_cast<float*>(place)[q * M.inner + j] = __double2float_rd(bound);
    } else {
      reinterpret_cast<uint16_t*>(place)[q * M.inner + j] =
          static_cast<uint16_t>(bound_pattern(M.dtype, bound));
    }
  }
}

__device__ unsigned word(const uint4& packed, int p) {
  return p == 0 ? packed.x : p == 1 ? packed.y : p == 2 ? packed.z : packed.w;
}

// Counts of one thread for one threshold while rows stream by.
struct HalfCounter {
  __half2 pair = __float2half2_rn(0.0f);

  // The bits of positive 16-bit floats order as the numbers do, so that bfloat16 is compared as
  // half. Each comparison gives two halves, 1 or 0; sums are exact up to 2048.
  __device__ void add(unsigned magnitudes, unsigned bounds) {
    pair = __hadd2(pair, __hgt2(reinterpret_cast<const __half2&>(magnitudes),
                                reinterpret_cast<const __half2&>(bounds)));
  }
  __device__ int value() const {
    return static_cast<int>(__low2float(pair)) + static_cast<int>(__high2float(pair));
  }
};
static_assert(kCountRows * 4 <= 2048, "a half holds every count of a run of rows");

struct FloatCounter {
  float sum = 0;

  __device__ void add(unsigned magnitude, unsigned bound) {
    sum += __uint_as_float(magnitude) > __uint_as_float(bound) ? 1.0f : 0.0f;
  }
  __device__ int value() const { return static_cast<int>(sum); }
};

template <int kDtype>
__device__ void count_segment(const Matrix& M, const Segment& segment, const char* bounds,
                              int* counts) {
  using Counter = std::conditional_t<kDtype == kFp32, FloatCounter, HalfCounter>;
  constexpr int kWidth = Vector<kDtype>::kWidth;
  constexpr unsigned kMask = kDtype == kFp32 ? 0x7fffffffu : 0x7fff7fffu;
  const int64_t vector = segment.strip * kThreads + threadIdx.x;
  const int64_t n_vectors = M.inner / kWidth;
  if (vector >= n_vectors) {
    return;
  }
  const int64_t stride = M.outer_stride / kWidth;
  const uint4* table = reinterpret_cast<const uint4*>(bounds + M.bounds_offset) + vector;
  uint4 bound[kTaus];
#pragma unroll
  for (int q = 0; q < kTaus; ++q) {
    bound[q] = __ldg(table + q * n_vectors);
  }
  // From the last line to the first: sum_kernel went the other way, and what it read last is still
  // in the cache.
  for (int64_t last = segment.end; last > segment.begin; last -= kCountRows) {
    const int64_t first = max(last - kCountRows, segment.begin);
    Counter counter[kTaus];
    int64_t line = last;
    const auto add = [&](const uint4& packed) {
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const unsigned magnitudes = word(packed, p) & kMask;
#pragma unroll
        for (int q = 0; q < kTaus; ++q) {
          counter[q].add(magnitudes, word(bound[q], p));
        }
      }
    };
    const uint4* source = vector_at(M, segment, line, 16 / kWidth, vector);
    for (; line - kUnit >= first; line -= kUnit) {
      source -= kUnit * stride;
      uint4 packed[kUnit];
#pragma unroll
      for (int u = 0; u < kUnit; ++u) {
        packed[u] = __ldg(source + u * stride);
      }
#pragma unroll
      for (int u = 0; u < kUnit; ++u) {
        add(packed[u]);
      }
    }
    for (; line > first; --line) {
      source -= stride;
      add(__ldg(source));
    }
#pragma unroll
    for (int q = 0; q < kTaus; ++q) {
      counts[q] += counter[q].value();
    }
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    count_kernel(const __grid_constant__ Work work, const __grid_constant__ Taus taus,
                 const char* bounds, const Summary* summary, unsigned long long* counts_out,
                 int n_taus) {
  const int64_t begin = first_unit_of_block(work, blockIdx.x);
  int64_t end = first_unit_of_block(work, blockIdx.x + 1);
  const bool odd = summary->odd != 0;
  const double mean = summary->mean;
  while (end > begin) {
    const Segment segment = last_segment(work, begin, &end);
    const Matrix& M = work.matrices[segment.matrix];
    int counts[kTaus] = {};
    if (odd || !M.vectorised) {
      for_each_score(M, segment, [&](double A) {
#pragma unroll
        for (int q = 0; q < kTaus; ++q) {
          counts[q] += q < taus.count && A > taus.values[q] * mean;
        }
      });
    } else if (M.dtype == kBf16) {
      count_segment<kBf16>(M, segment, bounds, counts);
    } else if (M.dtype == kFp16) {
      count_segment<kFp16>(M, segment, bounds, counts);
    } else {
      count_segment<kFp32>(M, segment, bounds, counts);
    }
#pragma unroll
    for (int q = 0; q < kTaus; ++q) {
      const int warp = __reduce_add_sync(0xffffffffu, counts[q]);
      // Integer sums are the same in any order.
      if (threadIdx.x % 32 == 0 && warp != 0 && q < taus.count) {
        atomicAdd(&counts_out[M.row * n_taus + q], static_cast<unsigned long long>(warp));
      }
    }
  }
}

Matrix describe(const Tensor& W, const Tensor& norm, int row) {
  const int64_t item_bytes = static_cast<int64_t>(W.element_size());
  Matrix M{};
  M.data = W.const_data_ptr();
  M.norm = norm.const_data_ptr();
  M.norm_stride = norm.stride(0);
  M.norm_is_double = norm.scalar_type() == ScalarType::Double;
  M.norm_along_inner = W.stride(1) <= W.stride(0) || W.size(0) == 1;
  M.inner = W.size(M.norm_along_inner ? 1 : 0);
  M.outer = W.size(M.norm_along_inner ? 0 : 1);
  M.inner_stride = W.stride(M.norm_along_inner ? 1 : 0);
  M.outer_stride = W.stride(M.norm_along_inner ? 0 : 1);
  M.row = row;
  M.dtype = W.scalar_type() == ScalarType::BFloat16 ? kBf16
            : W.scalar_type() == ScalarType::Half   ? kFp16
            : W.scalar_type() == ScalarType::Float  ? kFp32
                                                    : kFp64;
  const int64_t per_vector = 16 / item_bytes;
  M.vectorised = M.dtype != kFp64 && M.norm_along_inner && M.inner_stride == 1 &&
                 M.inner % per_vector == 0 &&
                 is_vector_aligned(M.data, M.outer_stride * item_bytes);
  M.width = static_cast<int>(kThreads * (M.dtype == kFp32 ? 4 : 8));
  M.units_down = ceil_div(M.outer, kUnit);
  return M;
}

std::tuple<Tensor, Tensor> outlier_counts_cuda(std::vector<Tensor> weights,
                                               std::vector<Tensor> norms,
                                               std::vector<double> thresholds) {
  check_outlier_counts(weights, norms);
  const int32_t device = weights[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const int n_weights = static_cast<int>(weights.size());
  const int n_taus = static_cast<int>(thresholds.size());
  Tensor counts = torch::stable::new_zeros(weights[0], {n_weights, n_taus}, ScalarType::Long);
  Tensor mean = torch::stable::new_zeros(weights[0], {}, ScalarType::Double);

  std::vector<Work> batches;
  int64_t bounds_bytes = 0;
  double entries = 0;
  for (int k = 0; k < n_weights; ++k) {
    if (weights[k].numel() == 0) {
      continue;
    }
    entries += static_cast<double>(weights[k].numel());
    if (batches.empty() || batches.back().n_matrices == kMatrices) {
      batches.push_back(Work{});
    }
    Work& work = batches.back();
    Matrix& M = work.matrices[work.n_matrices++];
    M = describe(weights[k], norms[k], k);
    M.first_unit = work.n_units;
    work.n_units += M.units_down * ceil_div(M.inner, M.width);
    if (M.vectorised) {
      M.first_column = work.n_columns;
      M.bounds_offset = bounds_bytes;
      work.n_columns += M.inner;
      bounds_bytes += ceil_div(kTaus * M.inner * (M.dtype == kFp32 ? 4 : 2), 16) * 16;
    }
  }
  if (batches.empty()) {
    return {counts, mean};
  }

  const int grid = multiprocessors(device) * kBlocksPerSm;
  const int n_partial = grid * static_cast<int>(batches.size());
  const Tensor memory =
      scratch(weights[0], bounds_bytes + 16 + n_partial * (sizeof(double) + sizeof(int)));
  char* bounds = static_cast<char*>(memory.mutable_data_ptr());
  Summary* summary = reinterpret_cast<Summary*>(bounds + bounds_bytes);
  double* partial = reinterpret_cast<double*>(bounds + bounds_bytes + 16);
  int* partial_odd = reinterpret_cast<int*>(partial + n_partial);

  for (size_t b = 0; b < batches.size(); ++b) {
    sum_kernel<<<grid, kThreads, 0, stream>>>(batches[b], partial + b * grid,
                                              partial_odd + b * grid);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  auto* counts_out = static_cast<unsigned long long*>(counts.mutable_data_ptr());
  auto* mean_out = static_cast<double*>(mean.mutable_data_ptr());
  // Without thresholds one round is left, for the mean.
  for (int first = 0; first == 0 || first < n_taus; first += kTaus) {
    Taus taus{};
    taus.count = std::min(kTaus, n_taus - first);
    std::copy_n(thresholds.begin() + first, taus.count, taus.values);
    for (const Work& work : batches) {
      const int blocks =
          static_cast<int>(std::max<int64_t>(1, ceil_div(work.n_columns, kBoundsThreads)));
      bounds_kernel<<<blocks, kBoundsThreads, 0, stream>>>(
          work, taus, partial, partial_odd, n_partial, entries, bounds, summary, mean_out);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      if (n_taus > 0) {
        count_kernel<<<grid, kThreads, 0, stream>>>(work, taus, bounds, summary, counts_out + first,
                                                    n_taus);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
    }
  }
  return {counts, mean};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(owlore, CUDA, m) {
  m.impl("outlier_counts", TORCH_BOX(&outlier_counts_cuda));
}

}  // namespace owlore
