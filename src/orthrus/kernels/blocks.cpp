// Products of rows and weights in blocks of 32 inputs, each block rounded by itself.
//
// A weight is scale * code + least, in 4 bits, or scale * (code - 128), in 8; a row's block is rounded to integers from
// -127 to 127. Products within a block are added up as integers, blocks one after another in float32, each operation
// rounded by itself: a row has the same bits at any width, beside any rows, with any number of threads and any set of
// instructions.
//
// Shapes: R rows, N outputs, K inputs. Weights lie in tiles of 16 outputs as one stream of blocks, [N / 16, K / 32, BYTES]:
// codes of four inputs of each output side by side, then 16 scales, and in 4 bits 16 least numbers, in float16. In 4
// bits, byte i of the first 256 holds the codes that bytes i and i + 256 hold in 8.

#include "operators.h"

namespace orthrus::blocks {
namespace {

constexpr int64_t TILE = 16, SIZE = 32;
constexpr int64_t AT_ONCE = 1 << 16, AT_LEAST = 1 << 13;  // weights, and inputs to round, that a thread takes at least
constexpr int64_t AHEAD = 2560;  // bytes
constexpr int TOGETHER = 4;  // rows
constexpr int PARTS = TILE / LANES, MOST = LANES == 16 ? 16 : 4;  // rows whose sums fit into registers
constexpr float LEAST = 127 * FLT_MIN;  // stands for a block's largest magnitude where that is smaller

template <int BITS>
constexpr int64_t BYTES = BITS == 4 ? SIZE / 2 * TILE + 4 * TILE : SIZE * TILE + 2 * TILE;

#if defined(__AVX512VNNI__)
inline Vector low(Vector v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline Vector high(Vector v) { return low(_mm512_srli_epi16(v, 4)); }
inline Floats number(float x) { return _mm512_set1_ps(x); }
inline Floats numbers(Vector v) { return _mm512_cvtepi32_ps(v); }
inline Floats halves(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats added(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
#else
inline Vector low(Vector v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline Vector high(Vector v) { return low(_mm256_srli_epi16(v, 4)); }
inline Floats number(float x) { return _mm256_set1_ps(x); }
inline Floats numbers(Vector v) { return _mm256_cvtepi32_ps(v); }
inline Floats halves(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats added(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
#endif

// A row's block: integers, what they are multiplied by, and that times their sum; what sums of 8-bit codes start at.
struct Block {
  int8_t code[SIZE];
  float scale, sum;
  int32_t start;
};

Block rounded(const float* x) {
  Block block;
  int32_t most = 0, sum = 0;  // the first as bits, whose order is that of magnitudes; NaN is beyond all
  for (int i = 0; i < SIZE; i++) most = std::max(most, (int32_t)(bits(x[i]) & 0x7fffffff));
  float largest = std::max(bits((uint32_t)most), LEAST), by = 127 / largest;  // NaN stays
  // Added to a number below 2**22 this rounds it to an integer, which is in the lowest byte.
  for (int i = 0; i < SIZE; i++) block.code[i] = (int8_t)bits(x[i] * by + 12582912.0f);
  for (int i = 0; i < SIZE; i++) sum += block.code[i];
  block.scale = largest / 127;
  block.sum = block.scale * (float)sum;
  block.start = -128 * sum;
  return block;
}

// Adds products of one vector's codes, of four inputs each.
template <int BITS>
inline Vector added(Vector sum, Vector codes, int32_t row) {
#if !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
  if (BITS == 8)  // in two halves, pairs of whose products fit into 16 bits
    return dot(_mm256_add_epi32(sum, _mm256_slli_epi32(dot(zeros(), high(codes), repeated(row)), 4)), low(codes),
               repeated(row));
#endif
  return dot(sum, codes, repeated(row));
}

// Adds some rows' products with one block of a tile's (LANES outputs') codes; TOGETHER of them in turn, so that none
// waits for itself.
template <int BITS, int ROWS>
[[gnu::always_inline]] inline void add_block(const Vector* codes, Floats scale, Floats least, const Block* row, Floats* sums) {
  if constexpr (ROWS > TOGETHER) {
    add_block<BITS, TOGETHER>(codes, scale, least, row, sums);
    add_block<BITS, ROWS - TOGETHER>(codes, scale, least, row + TOGETHER, sums + TOGETHER);
  } else {
    Vector sum[ROWS];
    for (int r = 0; r < ROWS; r++) sum[r] = BITS == 8 ? repeated(row[r].start) : zeros();
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        int32_t four;
        std::memcpy(&four, row[r].code + 4 * i, 4);
        sum[r] = added<BITS>(sum[r], codes[i], four);
      }
    for (int r = 0; r < ROWS; r++) {
      sums[r] = added(sums[r], times(numbers(sum[r]), times(scale, number(row[r].scale))));
      if (BITS == 4) sums[r] = added(sums[r], times(least, number(row[r].sum)));
    }
  }
}

// One tile's products with some rows, [ROWS, 16]; rows are in blocks, [K / 32, ROWS].
template <int BITS, int ROWS>
void tile(const uint8_t* weight, const Block* row, int64_t blocks, float* out) {
  for (int part = 0; part < PARTS; part++) {
    Floats sums[ROWS];
    for (int r = 0; r < ROWS; r++) sums[r] = none();
    for (int64_t b = 0; b < blocks; b++) {
      const uint8_t *block = weight + b * BYTES<BITS>, *from = block + part * LANES * 4;
      const uint8_t* scales = block + BYTES<BITS> - (BITS == 4 ? 4 : 2) * TILE + part * LANES * 2;
      for (int i = 0; ROWS > 4 && part == 0 && i < BYTES<BITS>; i += 64)  // of fewer, the processor itself reads ahead
        _mm_prefetch((const char*)weight + b * BYTES<BITS> + AHEAD + i, _MM_HINT_T0);
      Vector codes[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        Vector v = load(from + (BITS == 4 ? i % 4 : i) * 64);
        codes[i] = BITS == 8 ? v : i < 4 ? low(v) : high(v);
      }
      Floats least = BITS == 4 ? halves(scales + 2 * TILE) : none();
      add_block<BITS, ROWS>(codes, halves(scales), least, row + b * ROWS, sums);
    }
    for (int r = 0; r < ROWS; r++) store(out + r * TILE + part * LANES, sums[r]);
  }
}

template <int BITS, int ROWS = MOST>
void tile(int64_t rows, const uint8_t* weight, const Block* row, int64_t blocks, float* out) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return tile<BITS, ROWS - 1>(rows, weight, row, blocks, out);
  tile<BITS, ROWS>(weight, row, blocks, out);
}

template <int BITS>
void multiply(const float* input, const uint8_t* weight, const float* bias, int64_t R, int64_t N, int64_t K, float* out) {
  int64_t blocks = K / SIZE, tiles = (N + TILE - 1) / TILE;
  std::vector<Block> row(R * blocks);
  at::parallel_for(0, R, AT_LEAST / std::max<int64_t>(K, 1) + 1, [&](int64_t start, int64_t stop) {
    for (int64_t r = start; r < stop; r++) {
      int64_t first = r / MOST * MOST, rows = std::min<int64_t>(MOST, R - first);
      for (int64_t b = 0; b < blocks; b++)
        row[first * blocks + b * rows + r - first] = rounded(input + r * K + b * SIZE);
    }
  });
  int64_t grain = AT_ONCE / (std::max<int64_t>(K, 1) * TILE) + 1;
  at::parallel_for(0, tiles, grain, [&](int64_t start, int64_t stop) {
    float sums[MOST * TILE];
    for (int64_t t = start; t < stop; t++) {
      int64_t width = std::min(TILE, N - t * TILE);
      for (int64_t first = 0; first < R; first += MOST) {
        int64_t rows = std::min<int64_t>(MOST, R - first);
        tile<BITS>(rows, weight + t * blocks * BYTES<BITS>, row.data() + first * blocks, blocks, sums);
        for (int64_t r = 0; r < rows; r++)
          for (int64_t n = 0; n < width; n++) {
            float x = sums[r * TILE + n];
            out[(first + r) * N + t * TILE + n] = bias ? x + bias[t * TILE + n] : x;
          }
      }
    }
  });
}

// input [..., K] in float32, weight [N / 16, K / 32, BYTES] for 4 bits or 8, bias [N] in float32.
Tensor linear(const Tensor& input, const Tensor& weight, int64_t N, const std::optional<Tensor>& bias) {
  Tensor given = input.contiguous();
  TORCH_CHECK(given.is_cpu() && given.scalar_type() == at::kFloat, "rows must be float32 on the CPU");
  TORCH_CHECK(weight.dim() == 3, "weights must be in blocks");
  int64_t K = given.size(-1), tiles = (N + TILE - 1) / TILE, bytes = weight.size(2);
  TORCH_CHECK(K == weight.size(1) * SIZE, "inputs must be ", weight.size(1) * SIZE, " wide, found ", K);
  TORCH_CHECK(bytes == BYTES<4> || bytes == BYTES<8>, "blocks must be of ", BYTES<4>, " bytes or ", BYTES<8>);
  std::vector<int64_t> sizes = given.sizes().vec();
  sizes.back() = N;
  Tensor out = at::empty(sizes, given.options());
  (bytes == BYTES<4> ? multiply<4> : multiply<8>)(
      given.const_data_ptr<float>(), at_start<uint8_t>(weight, "weight", at::kByte, tiles * K / SIZE * bytes),
      at_start<float>(bias, "bias", at::kFloat, N), N ? out.numel() / N : 0, N, K, out.mutable_data_ptr<float>());
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(orthrus, library) {
  library.def("linear_blocks_" AS_TEXT(NAME) "(Tensor input, Tensor weight, int outputs, Tensor? bias) -> Tensor", &linear);
}

}  // namespace orthrus::blocks
