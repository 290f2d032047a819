// What operators share: float32 and bfloat16 numbers as bits, checks of tensors, the name of a set of instructions.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#define TEXT(name) #name
#define AS_TEXT(name) TEXT(name)

namespace orthrus {

using at::Tensor;

inline float bits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

inline uint32_t bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}

inline float wide(float x) { return x; }
inline float wide(uint16_t x) { return bits((uint32_t)x << 16); }
inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, uint16_t* out) {  // to the nearest bfloat16, ties to even
  uint32_t u = bits(x), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  *out = (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

// Where so many numbers of a type begin; nullptr where there are none.
template <typename Type>
const Type* at_start(const std::optional<Tensor>& tensor, const char* name, at::ScalarType type, int64_t count) {
  if (!tensor.has_value()) return nullptr;
  bool fits = tensor->is_cpu() && tensor->is_contiguous() && tensor->scalar_type() == type && tensor->numel() == count;
  TORCH_CHECK(fits, name, " must be ", count, " contiguous numbers in ", type, " on the CPU, found ", tensor->sizes(),
              " in ", tensor->scalar_type());
  return (const Type*)tensor->const_data_ptr();
}

}  // namespace orthrus
