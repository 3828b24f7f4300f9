#pragma once

#include "common.h"

#include <vector>

namespace owlore {

// Outliers of one block. With A_ij = |W_ij| * norm_j for each weight, and the mean over the entries
// of all of them together: counts[k, q] = #{A_k > thresholds[q] * mean}. No A is ever in memory.
//
// weights: [m_k, n_k] each, bfloat16, half, float or double, any strides.
// norms: [n_k] each, float or double.
// Returns counts [len(weights), len(thresholds)] int64 and mean [] float64, 0 without entries. A
// mean that is NaN or infinite has no entry above it.
inline void check_outlier_counts(const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& norms) {
  STD_TORCH_CHECK(!weights.empty(), "weights: expected at least one weight, got none");
  STD_TORCH_CHECK(norms.size() == weights.size(), "norms: expected ", weights.size(),
                  " entries, one for each weight, got ", norms.size());
  for (size_t k = 0; k < weights.size(); ++k) {
    const Tensor& W = weights[k];
    STD_TORCH_CHECK(W.dim() == 2, "weights[", k, "]: expected 2 dimensions, got ", W.dim());
    STD_TORCH_CHECK(is_supported_float(W.scalar_type()), "weights[", k,
                    "]: expected bfloat16, float16, float32 or float64");
    STD_TORCH_CHECK(norms[k].dim() == 1 && norms[k].size(0) == W.size(1), "norms[", k,
                    "]: expected shape [", W.size(1), "], one for each column of weights[", k, "]");
    STD_TORCH_CHECK(is_accumulator(norms[k].scalar_type()), "norms[", k,
                    "]: expected float32 or float64");
    STD_TORCH_CHECK(W.device() == weights[0].device() && norms[k].device() == weights[0].device(),
                    "weights[", k, "] and norms[", k,
                    "]: expected to be on the device of weights[0]");
  }
}

}  // namespace owlore
