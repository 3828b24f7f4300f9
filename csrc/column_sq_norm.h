#pragma once

#include "common.h"

#include <optional>

namespace owlore {

// acc[j] += sum_t x[t, j]^2 over all leading dimensions t of x, the masked-in ones if there is a
// mask. Sums run in double and enter acc once, so fp16 and bf16 cannot overflow on the way.
//
// acc: [n], float or double, updated in place.
// x: [..., n], bfloat16, half, float or double, any strides.
// mask: [...], bool, true where the row counts; a masked-out NaN does not count.
inline void check_column_sq_norm(const Tensor& acc, const Tensor& x,
                                 const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(acc.dim() == 1, "acc: expected 1 dimension, got ", acc.dim());
  STD_TORCH_CHECK(is_accumulator(acc.scalar_type()), "acc: expected float32 or float64");
  STD_TORCH_CHECK(is_supported_float(x.scalar_type()),
                  "x: expected bfloat16, float16, float32 or float64");
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected at least 1 dimension, got 0");
  const int64_t n = acc.size(0);
  STD_TORCH_CHECK(x.size(x.dim() - 1) == n, "x: expected a last dimension of ", n,
                  " as acc has, got ", x.size(x.dim() - 1));
  STD_TORCH_CHECK(n < 2 || acc.stride(0) != 0,
                  "acc: expected distinct elements, got an expanded tensor");
  STD_TORCH_CHECK(acc.device() == x.device(), "x: expected to be on the device of acc");
  if (!mask.has_value()) {
    return;
  }
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask: expected bool");
  STD_TORCH_CHECK(mask->device() == x.device(), "mask: expected to be on the device of x");
  STD_TORCH_CHECK(mask->dim() == x.dim() - 1, "mask: expected ", x.dim() - 1,
                  " dimensions, those of x without the last, got ", mask->dim());
  for (int64_t d = 0; d < mask->dim(); ++d) {
    STD_TORCH_CHECK(mask->size(d) == x.size(d), "mask: expected size ", x.size(d), " in dimension ",
                    d, ", got ", mask->size(d));
  }
}

}  // namespace owlore
