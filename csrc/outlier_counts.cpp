#include "outlier_counts.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

namespace owlore {
namespace {

// Entries of one chunk. Chunks depend on the shape alone, so the mean does not depend on the number
// of threads.
constexpr int64_t kChunkElements = 1 << 15;

// A weight as lines along its contiguous side. `per_entry`: a line is a row and meets the whole
// vector of norms; otherwise it is a column and has one norm.
struct Lines {
  Tensor W;
  std::vector<double> norm;
  bool per_entry;
  int64_t count;
  int64_t length;
  int64_t stride;
  int64_t step;
  int64_t per_chunk;
  int64_t chunks;

  Lines(const Tensor& weight, const Tensor& norms) : W(weight) {
    const int64_t n = W.size(1);
    norm.resize(n);
    const int64_t norm_stride = norms.stride(0);
    const void* source = norms.const_data_ptr();
    for (int64_t j = 0; j < n; ++j) {
      norm[j] = norms.scalar_type() == ScalarType::Float
                    ? static_cast<const float*>(source)[j * norm_stride]
                    : static_cast<const double*>(source)[j * norm_stride];
    }
    per_entry = W.stride(1) <= W.stride(0) || W.size(0) == 1;
    count = W.size(per_entry ? 0 : 1);
    length = W.size(per_entry ? 1 : 0);
    stride = W.stride(per_entry ? 0 : 1);
    step = W.stride(per_entry ? 1 : 0);
    per_chunk = std::max<int64_t>(1, kChunkElements / std::max<int64_t>(1, length));
    chunks = length == 0 ? 0 : ceil_div(count, per_chunk);
  }
};

// Independent sums per lane let the compiler vectorise without reordering a sum.
constexpr int64_t kLanes = 16;

template <typename T, bool kPerEntry>
OWLORE_CLONES double sum_line(const T* __restrict__ line, int64_t step,
                              const double* __restrict__ norm, int64_t length) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  if (step == 1) {
    for (; i + kLanes <= length; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        lanes[lane] += magnitude(line[i + lane]) * norm[kPerEntry ? i + lane : 0];
      }
    }
  }
  for (; i < length; ++i) {
    lanes[i % kLanes] += magnitude(line[i * step]) * norm[kPerEntry ? i : 0];
  }
  double sum = 0;
  for (const double lane : lanes) {
    sum += lane;
  }
  return sum;
}

template <typename T, bool kPerEntry>
OWLORE_CLONES void count_line(const T* __restrict__ line, int64_t step,
                              const double* __restrict__ norm, int64_t length,
                              const double* __restrict__ bounds, int64_t n_bounds,
                              int64_t* __restrict__ counts) {
  constexpr int64_t kBlock = 256;
  double A[kBlock];
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    const int64_t size = std::min(kBlock, length - begin);
    if (step == 1) {
      for (int64_t i = 0; i < size; ++i) {
        A[i] = magnitude(line[begin + i]) * norm[kPerEntry ? begin + i : 0];
      }
    } else {
      for (int64_t i = 0; i < size; ++i) {
        A[i] = magnitude(line[(begin + i) * step]) * norm[kPerEntry ? begin + i : 0];
      }
    }
    for (int64_t q = 0; q < n_bounds; ++q) {
      const double bound = bounds[q];
      int64_t above = 0;
      for (int64_t i = 0; i < size; ++i) {
        above += A[i] > bound;
      }
      counts[q] += above;
    }
  }
}

// Calls body(k, chunk, data, kind) for every chunk of every weight, in parallel.
template <typename Body>
void for_each_chunk(const std::vector<Lines>& lines, const Body& body) {
  for (size_t k = 0; k < lines.size(); ++k) {
    dispatch_float(lines[k].W.scalar_type(), [&](auto kind) {
      using T = decltype(kind);
      const T* data = static_cast<const T*>(lines[k].W.const_data_ptr());
      torch::stable::parallel_for(0, lines[k].chunks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          const int64_t first = chunk * lines[k].per_chunk;
          const int64_t last = std::min(first + lines[k].per_chunk, lines[k].count);
          for (int64_t line = first; line < last; ++line) {
            const T* start = data + line * lines[k].stride;
            const double* norm = lines[k].norm.data() + (lines[k].per_entry ? 0 : line);
            body(k, chunk, start, norm);
          }
        }
      });
    });
  }
}

std::tuple<Tensor, Tensor> outlier_counts_cpu(std::vector<Tensor> weights,
                                              std::vector<Tensor> norms,
                                              std::vector<double> thresholds) {
  check_outlier_counts(weights, norms);
  const int64_t n_weights = static_cast<int64_t>(weights.size());
  const int64_t n_bounds = static_cast<int64_t>(thresholds.size());
  std::vector<Lines> lines;
  std::vector<std::vector<double>> sums;
  std::vector<std::vector<int64_t>> above;
  double entries = 0;
  for (int64_t k = 0; k < n_weights; ++k) {
    lines.emplace_back(weights[k], norms[k]);
    sums.emplace_back(lines[k].chunks, 0.0);
    above.emplace_back(lines[k].chunks * n_bounds, 0);  // [chunks, n_bounds]
    entries += static_cast<double>(weights[k].numel());
  }

  for_each_chunk(lines, [&](size_t k, int64_t chunk, auto* line, const double* norm) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(line)>>;
    const auto sum_of = lines[k].per_entry ? sum_line<T, true> : sum_line<T, false>;
    sums[k][chunk] += sum_of(line, lines[k].step, norm, lines[k].length);
  });
  double mean = 0;
  for (const auto& chunk_sums : sums) {
    for (const double sum : chunk_sums) {
      mean += sum;
    }
  }
  mean = entries > 0 ? mean / entries : 0;

  std::vector<double> bounds;
  for (const double tau : thresholds) {
    bounds.push_back(tau * mean);
  }
  for_each_chunk(lines, [&](size_t k, int64_t chunk, auto* line, const double* norm) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(line)>>;
    const auto count = lines[k].per_entry ? count_line<T, true> : count_line<T, false>;
    count(line, lines[k].step, norm, lines[k].length, bounds.data(), n_bounds,
          &above[k][chunk * n_bounds]);
  });

  Tensor counts = torch::stable::new_zeros(weights[0], {n_weights, n_bounds}, ScalarType::Long);
  Tensor mean_out = torch::stable::new_zeros(weights[0], {}, ScalarType::Double);
  int64_t* out = static_cast<int64_t*>(counts.mutable_data_ptr());
  for (int64_t k = 0; k < n_weights; ++k) {
    for (size_t i = 0; i < above[k].size(); ++i) {
      out[k * n_bounds + i % n_bounds] += above[k][i];
    }
  }
  *static_cast<double*>(mean_out.mutable_data_ptr()) = mean;
  return {counts, mean_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(owlore, CPU, m) {
  m.impl("outlier_counts", TORCH_BOX(&outlier_counts_cpu));
}

}  // namespace owlore
