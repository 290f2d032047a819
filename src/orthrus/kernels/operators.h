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

#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

// Vectors of 32-bit integers and of float32 numbers, as wide as registers are.
#if defined(__AVX512VNNI__)
constexpr int LANES = 16;
using Vector = __m512i;
using Floats = __m512;
inline Vector zeros() { return _mm512_setzero_si512(); }
inline Vector load(const void* p) { return _mm512_loadu_si512(p); }
inline Vector repeated(int32_t four) { return _mm512_set1_epi32(four); }
inline void store(int32_t* p, Vector v) { _mm512_storeu_si512(p, v); }
inline Floats none() { return _mm512_setzero_ps(); }
inline Floats floats(const float* p) { return _mm512_loadu_ps(p); }
inline Floats floats(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline Floats plus(Floats sum, Floats a, Floats b) { return _mm512_fmadd_ps(a, b, sum); }
inline float total(Floats sum) { return _mm512_reduce_add_ps(sum); }
// Adds products of four unsigned bytes and four signed ones to each sum.
inline Vector dot(Vector sum, Vector some, Vector with) { return _mm512_dpbusd_epi32(sum, some, with); }
#else
constexpr int LANES = 8;
using Vector = __m256i;
using Floats = __m256;
inline Vector zeros() { return _mm256_setzero_si256(); }
inline Vector load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Vector repeated(int32_t four) { return _mm256_set1_epi32(four); }
inline void store(int32_t* p, Vector v) { _mm256_storeu_si256((__m256i*)p, v); }
inline Floats none() { return _mm256_setzero_ps(); }
inline Floats floats(const float* p) { return _mm256_loadu_ps(p); }
inline Floats floats(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline Floats plus(Floats sum, Floats a, Floats b) { return _mm256_fmadd_ps(a, b, sum); }
inline float total(Floats sum) {
  alignas(32) float each[8];
  _mm256_store_ps(each, sum);
  return ((each[0] + each[4]) + (each[2] + each[6])) + ((each[1] + each[5]) + (each[3] + each[7]));
}
#if defined(__AVXVNNI__)
inline Vector dot(Vector sum, Vector some, Vector with) { return _mm256_dpbusd_avx_epi32(sum, some, with); }
#else
inline Vector dot(Vector sum, Vector some, Vector with) {  // pairs of products must fit into 16 bits
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(some, with), _mm256_set1_epi16(1)));
}
#endif
#endif

// Where so many numbers of a type begin; nullptr where there are none.
template <typename Type>
const Type* at_start(const std::optional<Tensor>& tensor, const char* name, at::ScalarType type, int64_t count) {
  if (!tensor.has_value()) return nullptr;
  bool fits = tensor->is_cpu() && tensor->is_contiguous() && tensor->scalar_type() == type && tensor->numel() == count;
  TORCH_CHECK(fits, name, " must be ", count, " contiguous numbers in ", type, " on the CPU, found ", tensor->sizes(),
              " in ", tensor->scalar_type());
  return (const Type*)tensor->const_data_ptr();
}

// As many rows as a tile (AMX) has, where a process may use tiles; else 0.
#if defined(__AMX_INT8__)
inline int64_t tile_rows() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // of arch_prctl: asks Linux for tiles, once a process
  static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return allowed ? 16 : 0;
}

// Tiles of 16 rows of 64 bytes while it lives; afterwards as others had set them in this thread.
struct Tiles {
  alignas(64) uint8_t before[64] = {}, now[64] = {1};
  Tiles() {
    for (int tile = 0; tile < 8; tile++) now[16 + 2 * tile] = 64, now[48 + tile] = 16;
    asm volatile("" ::"r"(before), "r"(now) : "memory");  // the next two tell the compiler of eight bytes only
    _tile_storeconfig(before);
    _tile_loadconfig(now);
  }
  ~Tiles() {
    if (before[0])
      _tile_loadconfig(before);
    else
      _tile_release();
  }
};
#else
inline int64_t tile_rows() { return 0; }
struct Tiles {};
#endif

}  // namespace orthrus
