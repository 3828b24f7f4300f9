#include "column_sq_norm.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

namespace owlore {
namespace {

// The split into chunks depends on the shape alone, so the result does not depend on the number of
// threads. 64 partial sums of 11008 columns take 5.4 MiB.
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kChunkElements = 1 << 15;

template <typename T>
OWLORE_CLONES void add_squares(const T* __restrict__ row, int64_t stride, int64_t n,
                               double* __restrict__ sums) {
  if (stride == 1) {
    for (int64_t j = 0; j < n; ++j) {
      const double value = magnitude(row[j]);
      sums[j] += value * value;
    }
    return;
  }
  for (int64_t j = 0; j < n; ++j) {
    const double value = magnitude(row[j * stride]);
    sums[j] += value * value;
  }
}

// Row t of a tensor of any strides, its last dimension being the row.
struct Rows {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;

  Rows(const Tensor& tensor, int64_t leading) {
    for (int64_t d = 0; d < leading; ++d) {
      sizes.push_back(tensor.size(d));
      strides.push_back(tensor.stride(d));
    }
  }

  int64_t count() const {
    int64_t product = 1;
    for (const int64_t size : sizes) {
      product *= size;
    }
    return product;
  }

  int64_t offset(int64_t t) const {
    int64_t total = 0;
    for (size_t d = sizes.size(); d-- > 0;) {
      total += (t % sizes[d]) * strides[d];
      t /= sizes[d];
    }
    return total;
  }
};

void column_sq_norm_cpu(Tensor acc, Tensor x, std::optional<Tensor> mask) {
  check_column_sq_norm(acc, x, mask);
  const int64_t n = acc.size(0);
  const int64_t leading = x.dim() - 1;
  const Rows rows(x, leading);
  const int64_t count = rows.count();
  if (n == 0 || count == 0) {
    return;
  }
  const Rows mask_rows = mask.has_value() ? Rows(*mask, leading) : rows;
  const bool* keep = mask.has_value() ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  const int64_t stride = x.stride(leading);
  const int64_t chunks = std::min({kMaxChunks, count, ceil_div(count * n, kChunkElements)});
  std::vector<double> partial(chunks * n, 0.0);  // [chunks, n]
  dispatch_float(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    const T* data = static_cast<const T*>(x.const_data_ptr());
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t last = (chunk + 1) * count / chunks;
        for (int64_t t = chunk * count / chunks; t < last; ++t) {
          if (keep == nullptr || keep[mask_rows.offset(t)]) {
            add_squares(data + rows.offset(t), stride, n, &partial[chunk * n]);
          }
        }
      }
    });
  });
  const int64_t acc_stride = acc.stride(0);
  const auto finish = [&](auto* out) {
    using A = std::remove_pointer_t<decltype(out)>;
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        sum += partial[chunk * n + j];
      }
      out[j * acc_stride] += static_cast<A>(sum);
    }
  };
  if (acc.scalar_type() == ScalarType::Float) {
    finish(static_cast<float*>(acc.mutable_data_ptr()));
  } else {
    finish(static_cast<double*>(acc.mutable_data_ptr()));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(owlore, CPU, m) {
  m.impl("column_sq_norm_", TORCH_BOX(&column_sq_norm_cpu));
}

}  // namespace owlore

// Read by owlore/_extension.py.
extern "C" __attribute__((visibility("default"))) int owlore_built_with_cuda() {
#ifdef USE_CUDA
  return 1;
#else
  return 0;
#endif
}
