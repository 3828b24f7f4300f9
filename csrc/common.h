#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

// One binary for every x86-64: the loader picks the widest copy that the machine can run. GCC
// only: clang rejects the attribute on templates.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__CUDACC__)
#define OWLORE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define OWLORE_CLONES
#endif

namespace owlore {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Storage of the 16-bit floats; arithmetic is on what magnitude() returns.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// |x|, exact, in float or double. Both ops need the magnitude only.
inline float magnitude(Bf16 x) {
  return float_from_bits(static_cast<uint32_t>(x.bits & 0x7fffu) << 16);
}

inline float magnitude(Fp16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  // Rebiasing the exponent is exact for normal numbers. Subnormal ones go through a normal float
  // and a subtraction, so that a flush-to-zero mode cannot lose them.
  const float normal = float_from_bits(bits + (112u << 23));
  const float subnormal = float_from_bits(bits + (113u << 23)) - float_from_bits(113u << 23);
  const float special = float_from_bits(bits | 0x7f800000u);
  return bits < (1u << 23) ? subnormal : bits < (31u << 23) ? normal : special;
}

inline float magnitude(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return float_from_bits(bits & 0x7fffffffu);
}

inline double magnitude(double x) { return x < 0 ? -x : x; }

inline bool is_supported_float(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float ||
         dtype == ScalarType::Double;
}

inline bool is_accumulator(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double;
}

// Calls body with a value of the storage type of dtype, which must be a supported float.
template <typename Body>
void dispatch_float(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return body(Bf16{});
    case ScalarType::Half:
      return body(Fp16{});
    case ScalarType::Float:
      return body(float{});
    default:
      return body(double{});
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace owlore
