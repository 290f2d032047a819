// Products for decoding, each in one operation: rows and weights in 8-bit integers; few rows and weights as they are.
//
// Of integers: rows are rounded, multiplied, scaled and cast with the same integers and the same order of float32
// operations as in int8.py, so the results have the same bits. Compiled and loaded by compiled.py, with
// -ffp-contract=off.
//
// Shapes: R rows, N outputs, K inputs; blocks of 16 outputs, 4 inputs of each side by side: [N / 16, K / 4, 16, 4].

#include "operators.h"

namespace orthrus::linear {
namespace {

constexpr int64_t BLOCK = 16;          // outputs
constexpr int64_t AT_ONCE = 1 << 17;  // weights that a thread takes at least

// Rows and blocks whose sums fit into registers: few rows with many blocks, or more rows with half of these.
constexpr int FEW = 4, MOST = LANES == 16 ? 8 : 4, WIDE = LANES == 16 ? 4 : 1, HALF = LANES == 16 ? 2 : 1;

// Without VNNI, rows come in two parts: 64ths of their largest magnitude, and 128ths of those.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int SPLIT = 1, LARGEST = 127, ZERO = 128;
#else
constexpr int SPLIT = 2, LARGEST = 64, ZERO = 64;
#endif
constexpr int PARTS = BLOCK / LANES;
constexpr float LEAST = 127 * FLT_MIN;  // stands for a row's largest magnitude where that is smaller

// Rounds a row to integers, with ZERO added, [SPLIT, K]; returns its largest magnitude, which LARGEST stands for.
template <typename Type>
float rounded(const Type* row, const float* factor, int64_t K, float* scratch, uint8_t* out) {
  int32_t most = 0;  // as bits, whose order is that of magnitudes; NaN is beyond all
  for (int64_t k = 0; k < K; k++) {
    float x = factor ? wide(row[k]) * factor[k] : wide(row[k]);
    scratch[k] = x;
    int32_t magnitude = bits(x) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  float largest = std::max(bits((uint32_t)most), LEAST);  // NaN stays
  float scale = LARGEST / largest;
  // Added to a number below 2**22 this rounds it to an integer, whose sum with ZERO is in the lowest byte.
  const float round = 8388608.0f + ZERO;
  for (int64_t k = 0; k < K; k++) {
    float x = scratch[k] * scale, integer = x + round;
    out[k] = (uint8_t)bits(integer);
    if (SPLIT == 2) out[K + k] = (uint8_t)bits((x - (integer - round)) * 128 + round);
  }
  return largest;
}

// Sums of products of some rows with some blocks, [rows, blocks * 16].
template <int ROWS, int BLOCKS>
void sums(const uint8_t* row, const int8_t* weight, int64_t K, int32_t* out) {
  Vector sum[ROWS][BLOCKS * PARTS];
  for (int r = 0; r < ROWS; r++)
    for (int b = 0; b < BLOCKS * PARTS; b++) sum[r][b] = zeros();
  for (int64_t k = 0; k < K; k += 4) {
    Vector some[BLOCKS * PARTS];
    for (int b = 0; b < BLOCKS * PARTS; b++)
      some[b] = load(weight + (b / PARTS) * K * BLOCK + k * BLOCK + (b % PARTS) * LANES * 4);
    for (int b = 0; b < BLOCKS; b++)  // those of the next blocks: without, memory waits at the start of each matrix
      _mm_prefetch((const char*)weight + (b + BLOCKS) * K * BLOCK + k * BLOCK, _MM_HINT_T1);
    for (int r = 0; r < ROWS; r++) {
      int32_t four;
      std::memcpy(&four, row + r * K + k, 4);
      Vector each = repeated(four);
      for (int b = 0; b < BLOCKS * PARTS; b++) sum[r][b] = dot(sum[r][b], each, some[b]);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int b = 0; b < BLOCKS * PARTS; b++) store(out + (r * BLOCKS * PARTS + b) * LANES, sum[r][b]);
}

template <int MOST_ROWS, int BLOCKS>
void sums_of(int64_t rows, const uint8_t* row, const int8_t* weight, int64_t K, int32_t* out) {
  if (rows == MOST_ROWS) return sums<MOST_ROWS, BLOCKS>(row, weight, K, out);
  if constexpr (MOST_ROWS > 1) sums_of<MOST_ROWS - 1, BLOCKS>(rows, row, weight, K, out);
}

#if defined(__AMX_INT8__)
// Sums of products of 16 rows with some blocks, [16, blocks * 16]; K is a multiple of 64.
template <int BLOCKS>
void tile_sums(const uint8_t* row, const int8_t* weight, int64_t K, int32_t* out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < K; k += 64) {
    const int8_t* block = weight + k * BLOCK;
    _tile_loadd(4, row + k, K);
    _tile_loadd(5, block, 64);
    _tile_dpbusd(0, 4, 5);
    if constexpr (BLOCKS == 4) {
      _tile_loadd(6, block + K * BLOCK, 64);
      _tile_dpbusd(1, 4, 6);
      _tile_loadd(7, block + 2 * K * BLOCK, 64);
      _tile_dpbusd(2, 4, 7);
      _tile_loadd(5, block + 3 * K * BLOCK, 64);
      _tile_dpbusd(3, 4, 5);
    }
    for (int b = 0; b < BLOCKS; b++)  // two tiles ahead of each
      for (int i = 0; i < 16; i++) _mm_prefetch((const char*)block + b * K * BLOCK + 2048 + i * 64, _MM_HINT_T0);
  }
  _tile_stored(0, out, BLOCKS * 64);
  if constexpr (BLOCKS == 4) {
    _tile_stored(1, out + 16, BLOCKS * 64);
    _tile_stored(2, out + 32, BLOCKS * 64);
    _tile_stored(3, out + 48, BLOCKS * 64);
  }
}
#else
template <int BLOCKS>
void tile_sums(const uint8_t*, const int8_t*, int64_t, int32_t*) {}
#endif

template <typename Type>
void multiply(const Type* input, const int8_t* weight, const int32_t* zero, const float* scale, const float* factor,
              const float* bias, int64_t R, int64_t N, int64_t K, Type* out) {
  int64_t tile = R > FEW && K % 64 == 0 ? tile_rows() : 0, each = tile ? tile : MOST / SPLIT;
  std::vector<uint8_t> row((R + each) * SPLIT * K);  // filled up to whole tiles
  std::vector<float> most(R);
  at::parallel_for(0, R, AT_ONCE / (K * 4 + 1) + 1, [&](int64_t start, int64_t stop) {
    std::vector<float> scratch(K);
    for (int64_t r = start; r < stop; r++)
      most[r] = rounded(input + r * K, factor, K, scratch.data(), row.data() + r * SPLIT * K);
  });
  int64_t blocks = (N + BLOCK - 1) / BLOCK;
  int64_t grain = std::max<int64_t>(WIDE, AT_ONCE / (std::max<int64_t>(K, 1) * BLOCK) + 1);
  int64_t together = tile || R * SPLIT <= FEW ? WIDE : HALF;  // blocks
  at::parallel_for(0, blocks, grain, [&](int64_t start, int64_t stop) {
    std::optional<Tiles> set;
    if (tile) set.emplace();
    int32_t total[16 * WIDE * BLOCK];
    for (int64_t b = start, some; b < stop; b += some) {
      some = stop - b >= together ? together : 1;
      int64_t first = b * BLOCK, width = some * BLOCK, here = std::min(width, N - first);
      for (int64_t r0 = 0; r0 < R; r0 += each) {
        int64_t rows = std::min(each, R - r0);
        const int8_t* from = weight + first * K;
        const uint8_t* those = row.data() + r0 * SPLIT * K;
        if (tile)
          (some == WIDE ? tile_sums<WIDE> : tile_sums<1>)(those, from, K, total);
        else
          (some == WIDE   ? sums_of<FEW, WIDE>
           : some == HALF ? sums_of<MOST, HALF>
                          : sums_of<MOST, 1>)(rows * SPLIT, those, from, K, total);
        for (int64_t r = 0; r < rows; r++) {
          const int32_t* sum = total + r * SPLIT * width;
          Type* to = out + (r0 + r) * N + first;
          for (int64_t n = 0; n < here; n++) {
            float x = (float)(sum[n] - zero[first + n]) * scale[first + n];
            if (SPLIT == 2) x += (float)(sum[width + n] - zero[first + n]) * scale[first + n] / 128;
            x *= most[r0 + r];
            narrow(bias ? x + bias[first + n] : x, to + n);
          }
        }
      }
    }
  });
}

// input [..., K] in float32 or bfloat16, weight [blocks, K / 4, 16, 4], zero [N]: ZERO times the sums of weights.
Tensor linear(const Tensor& input, const Tensor& weight, const Tensor& zero, const Tensor& scale,
              const std::optional<Tensor>& factor, const std::optional<Tensor>& bias) {
  Tensor given = input.contiguous();
  int64_t K = given.size(-1), N = scale.numel();
  TORCH_CHECK(given.is_cpu(), "rows must be on the CPU");
  TORCH_CHECK(weight.dim() == 4, "weights must be in blocks");
  TORCH_CHECK(K == weight.size(1) * 4, "inputs must be ", weight.size(1) * 4, " wide, found ", K);
  std::vector<int64_t> sizes = given.sizes().vec();
  sizes.back() = N;
  Tensor out = at::empty(sizes, given.options());
  int64_t R = N ? out.numel() / N : 0, filled = (N + BLOCK - 1) / BLOCK * BLOCK;
  auto run = [&](auto type) {
    using Type = decltype(type);
    multiply<Type>((const Type*)given.const_data_ptr(), at_start<int8_t>(weight, "weight", at::kChar, filled * K),
                   at_start<int32_t>(zero, "zero", at::kInt, N), at_start<float>(scale, "scale", at::kFloat, N),
                   at_start<float>(factor, "factor", at::kFloat, K), at_start<float>(bias, "bias", at::kFloat, N), R, N,
                   K, (Type*)out.mutable_data_ptr());
  };
  if (given.scalar_type() == at::kFloat) {
    run(float());
  } else {
    TORCH_CHECK(given.scalar_type() == at::kBFloat16, "inputs must be float32 or bfloat16");
    run(uint16_t());
  }
  return out;
}

// One row times weights as they are, [N, K], summed in float32: read as fast as memory gives them.
constexpr int64_t SOME = 4, AHEAD = 2;  // outputs whose sums are made together; how many times as many are fetched before

template <typename Type>
void multiply_one(const Type* input, const Type* weight, const Type* bias, int64_t N, int64_t K, Type* out) {
  std::vector<float> row(K);
  for (int64_t k = 0; k < K; k++) row[k] = wide(input[k]);
  int64_t grain = std::max<int64_t>(1, AT_ONCE / (std::max<int64_t>(K, 1) * SOME)), groups = (N + SOME - 1) / SOME;
  at::parallel_for(0, groups, grain, [&](int64_t start, int64_t stop) {
    for (int64_t g = start; g < stop; g++) {
      const Type* of[SOME];
      Floats sum[SOME];
      for (int64_t i = 0; i < SOME; i++) of[i] = weight + std::min(g * SOME + i, N - 1) * K, sum[i] = none();
      for (int64_t k = 0; k < K; k += LANES) {
        Floats x = floats(row.data() + k);
        for (int64_t i = 0; i < SOME; i++) {
          _mm_prefetch((const char*)(of[i] + AHEAD * SOME * K + k), _MM_HINT_T1);
          sum[i] = plus(sum[i], x, floats(of[i] + k));
        }
      }
      for (int64_t i = 0; i < SOME && g * SOME + i < N; i++) {
        float x = total(sum[i]);
        narrow(bias ? x + wide(bias[g * SOME + i]) : x, out + g * SOME + i);
      }
    }
  });
}

// Rows in bfloat16 by tiles (AMX), 16 of them at a time, times 16 rows of weights; N is a multiple of 16, K of 32. A row has
// the same bits among any number of them.
#if defined(__AMX_BF16__)
void multiply_by_tiles(const uint16_t* input, const uint16_t* weight, const uint16_t* bias, int64_t R, int64_t N, int64_t K,
                       uint16_t* out) {
  int64_t parts = (R + 15) / 16;
  std::vector<uint16_t> rows(parts * K * 16);  // [parts, K / 2, 16, 2]
  for (int64_t r = 0; r < R; r++)
    for (int64_t k = 0; k < K; k++) rows[r / 16 * K * 16 + (k / 2 * 16 + r % 16) * 2 + k % 2] = input[r * K + k];
  at::parallel_for(0, N / 16, std::max<int64_t>(1, AT_ONCE / (K * 16)), [&](int64_t start, int64_t stop) {
    Tiles set;
    alignas(64) float sums[16 * 16];
    for (int64_t n = start * 16; n < stop * 16; n += 16)
      for (int64_t p = 0; p < parts; p++) {
        const uint16_t* from = weight + n * K;
        _tile_zero(0);
        for (int64_t k = 0; k < K; k += 32) {
          for (int64_t i = 0; i < 16; i++) _mm_prefetch((const char*)(from + (16 + i) * K + k), _MM_HINT_T1);
          _tile_loadd(1, from + k, K * 2);
          _tile_loadd(2, rows.data() + (p * K + k) * 16, 64);
          _tile_dpbf16ps(0, 1, 2);
        }
        _tile_stored(0, sums, 64);
        for (int64_t r = p * 16; r < std::min(R, p * 16 + 16); r++)
          for (int64_t i = 0; i < 16; i++) {
            float x = sums[i * 16 + r % 16];
            narrow(bias ? x + wide(bias[n + i]) : x, out + r * N + n + i);
          }
      }
  });
}
#else
void multiply_by_tiles(const uint16_t*, const uint16_t*, const uint16_t*, int64_t, int64_t, int64_t, uint16_t*) {}
#endif

// input [..., R, K], weight [N, K] and bias [N] in float32, or all in bfloat16. Meant for one row, and by tiles for few.
Tensor linear_few(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  Tensor given = input.contiguous(), those = weight.contiguous();
  int64_t K = those.size(1), N = those.size(0);
  bool fits = given.dim() > 0 && given.size(-1) == K && K % LANES == 0;
  TORCH_CHECK(fits, "rows must be ", K, " wide, a multiple of ", LANES, ", found ", given.sizes());
  bool served = given.scalar_type() == at::kFloat || given.scalar_type() == at::kBFloat16;
  TORCH_CHECK(served && given.scalar_type() == those.scalar_type(), "rows must have their weights' type");
  TORCH_CHECK(given.is_cpu() && those.is_cpu(), "rows and their weights must be on the CPU");
  std::vector<int64_t> sizes = given.sizes().vec();
  sizes.back() = N;
  Tensor out = at::empty(sizes, given.options());
  int64_t R = N ? out.numel() / N : 0;
  auto run = [&](auto type) {
    using Type = decltype(type);
    const Type *rows = (const Type*)given.const_data_ptr(), *matrix = (const Type*)those.const_data_ptr();
    const Type* more = at_start<Type>(bias, "bias", given.scalar_type(), N);
    Type* to = (Type*)out.mutable_data_ptr();
    if constexpr (std::is_same_v<Type, uint16_t>)
      if (K > 0 && K % 32 == 0 && N % 16 == 0 && tile_rows()) return multiply_by_tiles(rows, matrix, more, R, N, K, to);
    for (int64_t r = 0; r < R; r++) multiply_one<Type>(rows + r * K, matrix, more, N, K, to + r * N);
  };
  given.scalar_type() == at::kFloat ? run(float()) : run(uint16_t());
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(orthrus, library) {
  library.def("linear_int8_" AS_TEXT(NAME)
              "(Tensor input, Tensor weight, Tensor zero, Tensor scale, Tensor? factor, Tensor? bias) -> Tensor", &linear);
  library.def("linear_few_" AS_TEXT(NAME) "(Tensor input, Tensor weight, Tensor? bias) -> Tensor", &linear_few);
}

}  // namespace orthrus::linear
