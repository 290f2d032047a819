// Attention of few query rows over cached keys, in float32 or bfloat16, or in float32 over such in bfloat16, summed in
// float32.
//
// Each lane of a vector, or row of a tile (AMX, keys in bfloat16), is a query row, so that a row's sums are made in one
// order, that of keys, whatever the number of rows, their neighbours, the threads and the slots that a row does not see.
//
// Shapes: B texts, N key heads, G queries of each, Q query rows, S keys, D and E sizes of keys and values.

#include <ATen/ops/as_strided.h>

#include "operators.h"

namespace orthrus::attention {
namespace {

typedef float Eight __attribute__((vector_size(32)));
typedef int32_t EightIntegers __attribute__((vector_size(32)));
inline Eight plus(Eight sum, Eight a, Eight b) { return (Eight)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum); }
inline void repeat(float x, Eight* out) { *out = (Eight)_mm256_set1_ps(x); }
inline Eight at_least(Eight a, Eight b) { return (Eight)_mm256_max_ps((__m256)a, (__m256)b); }
#if defined(__AVX512F__)
typedef float Sixteen __attribute__((vector_size(64)));
typedef int32_t SixteenIntegers __attribute__((vector_size(64)));
inline Sixteen plus(Sixteen sum, Sixteen a, Sixteen b) {
  return (Sixteen)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
}
inline void repeat(float x, Sixteen* out) { *out = (Sixteen)_mm512_set1_ps(x); }
inline Sixteen at_least(Sixteen a, Sixteen b) { return (Sixteen)_mm512_max_ps((__m512)a, (__m512)b); }
#else
using Sixteen = Eight;
using SixteenIntegers = EightIntegers;
#endif

constexpr int64_t TILE = 64, KEYS = 8, COLUMNS = 8;  // keys under one maximum; keys and columns summed side by side
constexpr int64_t AHEAD = TILE;  // how many keys before their use memory is asked for them
constexpr float HIDDEN = -FLT_MAX;

template <typename V>
inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename V>
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }

template <typename V>
inline V repeated(float x) {
  V v;
  repeat(x, &v);
  return v;
}

// exp(x) of x <= 0 to a unit in the last place; 0 where it would be below the normal numbers.
template <typename V, typename Integers>
inline V exponential(V x) {
  V magic = repeated<V>(12582912.0f), shifted = plus(magic, x, repeated<V>(1.44269504f)), n = shifted - magic;
  V r = plus(plus(x, n, repeated<V>(-0.693359375f)), n, repeated<V>(2.12194440e-4f));
  V p = repeated<V>(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = plus(repeated<V>(c), p, r);
  p = plus(r, p, r * r) + 1.0f;
  V power = (V)(((Integers)shifted << 23) + 0x3f800000);  // 2**n
  Integers small = x < repeated<V>(-87.0f);
  return (V)((Integers)(p * power) & ~small);
}

// Scores of some keys, [COUNT, lanes], for queries [D, lanes].
template <typename V, int COUNT>
inline void scores(const float* query, const float* key, int64_t stride, int64_t D, float scale, float* out) {
  constexpr int L = sizeof(V) / 4;
  V sum[COUNT] = {};
  for (int64_t d = 0; d < D; d++) {
    V q = load<V>(query + d * L);
    for (int k = 0; k < COUNT; k++) sum[k] = plus(sum[k], q, repeated<V>(key[k * stride + d]));
  }
  for (int k = 0; k < COUNT; k++) store(out + k * L, sum[k] * scale);
}

// Adds weighted columns of values to sums [COUNT, lanes], after these are multiplied by a factor.
template <typename V, int COUNT>
inline void weighted(const float* weight, const float* value, int64_t stride, int64_t keys, V factor, float* out) {
  constexpr int L = sizeof(V) / 4;
  V sum[COUNT];
  for (int e = 0; e < COUNT; e++) sum[e] = load<V>(out + e * L) * factor;
  for (int64_t k = 0; k < keys; k++) {
    V w = load<V>(weight + k * L);
    for (int e = 0; e < COUNT; e++) sum[e] = plus(sum[e], w, repeated<V>(value[k * stride + e]));
  }
  for (int e = 0; e < COUNT; e++) store(out + e * L, sum[e]);
}

// Rows of numbers in float32, as they are or converted.
inline const float* in_float(const float* rows, int64_t& stride, int64_t, int64_t, float*) { return rows; }
inline const float* in_float(const uint16_t* rows, int64_t& stride, int64_t count, int64_t width, float* scratch) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t j = 0; j < width; j++) scratch[i * width + j] = wide(rows[i * stride + j]);
  stride = width;
  return scratch;
}

// Asks memory for the numbers of some keys.
template <typename Type>
inline void fetch(const Type* rows, int64_t stride, int64_t width) {
  for (int64_t k = 0; k < KEYS; k++)
    for (int64_t i = 0; i < width; i += 64 / sizeof(Type)) _mm_prefetch((const char*)(rows + k * stride + i), _MM_HINT_T1);
}

// What the rows of a text see: keys from `first` to `plain` all of them, and those up to `last` as a mask says.
struct Seen {
  int64_t first = 0, plain, last;
  std::vector<float> mask;  // [last - plain, Q], added to scores
};

inline float added(bool x) { return x ? 0 : HIDDEN; }
inline float added(float x) { return x; }
inline float added(uint16_t x) { return wide(x); }

// How many keys from `first` on a condition holds for, 64 of them at a time where that serves.
template <typename Mask, typename Holds>
int64_t run(const Mask* mask, int64_t first, int64_t end, Holds holds) {
  for (bool all = true; all && first + 64 <= end;) {
    for (int64_t s = 0; s < 64; s++) all &= holds(added(mask[first + s]));
    first += all ? 64 : 0;
  }
  while (first < end && holds(added(mask[first]))) first++;
  return first;
}

template <typename Mask>
Seen seen(const Mask* mask, int64_t stride, int64_t Q, int64_t S) {
  Seen out{S, S, 0, {}};
  auto hides = [](float x) { return x <= HIDDEN / 2; };
  for (int64_t q = 0; q < Q; q++) {
    const Mask* row = mask + q * stride;
    out.first = run(row, 0, out.first, hides) / TILE * TILE;
    int64_t last = S;
    while (last > out.last && hides(added(row[last - 1]))) last--;
    out.last = std::max(out.last, last);
  }
  for (int64_t q = 0; q < Q; q++)
    out.plain = run(mask + q * stride, out.first, std::min(out.plain, out.last), [](float x) { return x == 0; });
  for (int64_t s = out.plain; s < out.last; s++)
    for (int64_t q = 0; q < Q; q++) out.mask.push_back(added(mask[q * stride + s]));
  return out;
}

// Where the numbers of a tensor [texts, heads, rows, numbers] lie, these side by side.
template <typename Type>
struct Rows {
  const Type* start;
  int64_t text, head, row;
  explicit Rows(const Tensor& x)
      : start((const Type*)x.const_data_ptr()), text(x.stride(0)), head(x.stride(1)), row(x.stride(2)) {}
  const Type* at(int64_t b, int64_t h) const { return start + b * text + h * head; }
};

// Turns scores [keys, lanes] of the keys from `tile` on into weights, under a maximum that they may raise, and adds these to
// their sums; returns what sums so far are multiplied by. `of` says which query row each of `rows` lanes is.
template <typename V, typename Integers>
inline V weighed(float* weights, int64_t tile, int64_t keys, const Seen& seen, int64_t Q, const int64_t* of, int64_t rows,
                 V& most, V& total) {
  constexpr int64_t L = sizeof(V) / 4;
  for (int64_t s = std::max(tile, seen.plain); s < tile + keys; s++)
    for (int64_t l = 0; l < rows; l++) weights[(s - tile) * L + l] += seen.mask[(s - seen.plain) * Q + of[l]];
  V before = most;
  for (int64_t k = 0; k < keys; k++) most = at_least(most, load<V>(weights + k * L));
  V factor = exponential<V, Integers>(before - most);
  V sum = total * factor;
  for (int64_t k = 0; k < keys; k++) {
    V weight = exponential<V, Integers>(load<V>(weights + k * L) - most);
    sum += weight;
    store(weights + k * L, weight);
  }
  total = sum;
  return factor;
}

// Attends with as many rows of a key head as there are lanes, at most: row `first + l` of [G, Q] in lane l.
template <typename V, typename Integers, typename Type, typename Kept>
void attend(const Rows<Type>& query, const Kept* key, int64_t key_row, const Kept* value, int64_t value_row,
            const Seen& seen, int64_t b, int64_t n, int64_t G, int64_t Q, int64_t first, int64_t D, int64_t E,
            float scale, Type* out, int64_t between) {
  constexpr int64_t L = sizeof(V) / 4;
  int64_t rows = std::min(L, G * Q - first);
  std::vector<float> scratch((D + E + TILE) * L + TILE * std::max(D, E));
  float *queries = scratch.data(), *sums = queries + D * L, *weights = sums + E * L, *wider = weights + TILE * L;
  int64_t of[L];  // which query row each lane is
  for (int64_t l = 0; l < rows; l++) {
    of[l] = (first + l) % Q;
    const Type* row = query.at(b, n * G + (first + l) / Q) + of[l] * query.row;
    for (int64_t d = 0; d < D; d++) queries[d * L + l] = wide(row[d]);
  }
  V most = repeated<V>(HIDDEN), total = {};
  for (int64_t tile = seen.first; tile < seen.last; tile += TILE) {
    int64_t keys = std::min(TILE, seen.last - tile), stride = key_row, k = 0;
    const float* those = in_float(key + tile * key_row, stride, keys, D, wider);
    for (; k + KEYS <= keys; k += KEYS) {
      fetch(key + (tile + k + AHEAD) * key_row, key_row, D);
      fetch(value + (tile + k) * value_row, value_row, E);
      scores<V, KEYS>(queries, those + k * stride, stride, D, scale, weights + k * L);
    }
    for (; k < keys; k++) scores<V, 1>(queries, those + k * stride, stride, D, scale, weights + k * L);
    V factor = weighed<V, Integers>(weights, tile, keys, seen, Q, of, rows, most, total);
    stride = value_row;
    those = in_float(value + tile * value_row, stride, keys, E, wider);
    int64_t e = 0;
    for (; e + COLUMNS <= E; e += COLUMNS) weighted<V, COLUMNS>(weights, those + e, stride, keys, factor, sums + e * L);
    for (; e < E; e++) weighted<V, 1>(weights, those + e, stride, keys, factor, sums + e * L);
  }
  for (int64_t l = 0; l < rows; l++) {
    Type* row = out + of[l] * between + (first + l) / Q * E;
    for (int64_t e = 0; e < E; e++) narrow(total[l] == 0 ? 0.0f : sums[e * L + l] / total[l], row + e);
  }
}

#if defined(__AMX_BF16__)
// Transposes 16 x 16 numbers of 32 bits: at each step, halves of rows that are so far apart change places.
inline void transpose(__m512i (&x)[16]) {
#pragma GCC unroll 4
  for (int step = 8; step > 0; step /= 2) {
    alignas(64) int32_t low[16], high[16];
    for (int l = 0; l < 16; l++) low[l] = l & step ? 16 + l - step : l, high[l] = l & step ? 16 + l : l + step;
    __m512i from = _mm512_load_si512(low), to = _mm512_load_si512(high);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      if (i & step) continue;
      __m512i one = x[i], other = x[i + step];
      x[i] = _mm512_permutex2var_epi32(one, from, other);
      x[i + step] = _mm512_permutex2var_epi32(one, to, other);
    }
  }
}

// Bits of numbers as bfloat16, in the upper half of each.
inline __m512i rounded(Sixteen x) {
  __m512i u = (__m512i)x, odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}

// The same by tiles, for keys in bfloat16, to which queries and weights are rounded. D and E are multiples of 32. Columns
// of values, and so of sums, lie in the order in which instructions put two rows of 32 numbers together.
template <typename Type>
void attend_by_tiles(const Rows<Type>& query, const uint16_t* key, int64_t key_row, const uint16_t* value,
                     int64_t value_row, const Seen& seen, int64_t b, int64_t n, int64_t G, int64_t Q, int64_t first,
                     int64_t D, int64_t E, float scale, Type* out, int64_t between) {
  constexpr int64_t L = 16, PAIRS = TILE / 2;
  int64_t rows = std::min(L, G * Q - first), of[L];
  std::vector<float> scratch(TILE * L + L * E);
  float *scores = scratch.data(), *sums = scores + TILE * L;  // [TILE, L], [L, E]
  std::vector<uint16_t> narrower(D * L + L * TILE + TILE * E + TILE * D);
  uint16_t *queries = narrower.data(), *weights = queries + D * L;             // [D / 2, L, 2], [L, TILE]
  uint16_t *values = weights + L * TILE, *last_keys = values + TILE * E;       // [TILE / 2, E, 2], [TILE, D]
  for (int64_t l = 0; l < rows; l++) {
    of[l] = (first + l) % Q;
    const Type* row = query.at(b, n * G + (first + l) / Q) + of[l] * query.row;
    for (int64_t d = 0; d < D; d++) narrow(wide(row[d]), queries + (d / 2 * L + l) * 2 + d % 2);
  }
  Sixteen most = repeated<Sixteen>(HIDDEN), total = {};
  for (int64_t tile = seen.first; tile < seen.last; tile += TILE) {
    int64_t keys = std::min(TILE, seen.last - tile), stride = key_row;
    const uint16_t* those = key + tile * key_row;
    if (keys < TILE) {  // what lies behind the last key may be anything, or nothing
      for (int64_t k = 0; k < keys; k++) std::memcpy(last_keys + k * D, those + k * key_row, D * 2);
      those = last_keys, stride = D;
    }
    for (int64_t k = 0; k < keys; k += KEYS) {
      fetch(key + (tile + k + AHEAD) * key_row, key_row, D);
      fetch(value + (tile + k) * value_row, value_row, E);
    }
    for (int64_t k = 0; k < keys; k += L) {
      _tile_zero(0);
      for (int64_t d = 0; d < D; d += 32) {
        _tile_loadd(1, those + k * stride + d, stride * 2);
        _tile_loadd(2, queries + d * L, 64);
        _tile_dpbf16ps(0, 1, 2);
      }
      _tile_stored(0, scores + k * L, 64);
    }
    for (int64_t k = 0; k < keys; k++) store(scores + k * L, load<Sixteen>(scores + k * L) * scale);
    Sixteen factor = weighed<Sixteen, SixteenIntegers>(scores, tile, keys, seen, Q, of, rows, most, total);
    std::fill(scores + keys * L, scores + TILE * L, 0.0f);
    for (int64_t part = 0; part < PAIRS; part += L) {
      __m512i pair[L];
#pragma GCC unroll 16
      for (int64_t p = 0; p < L; p++) {
        const float* two = scores + (part + p) * 2 * L;
        __m512i one = rounded(load<Sixteen>(two)), other = rounded(load<Sixteen>(two + L));
        pair[p] = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(one, 16), other);
      }
      transpose(pair);
#pragma GCC unroll 16
      for (int64_t l = 0; l < L; l++) _mm512_storeu_si512(weights + l * TILE + part * 2, pair[l]);
    }
    for (int64_t p = 0; p < PAIRS; p++)
      for (int64_t e = 0; e < E; e += 32) {
        auto at = [&](int64_t k) {
          return k < keys ? _mm512_loadu_si512(value + (tile + k) * value_row + e) : _mm512_setzero_si512();
        };
        __m512i one = at(2 * p), other = at(2 * p + 1);
        _mm512_storeu_si512(values + (p * E + e) * 2, _mm512_unpacklo_epi16(one, other));
        _mm512_storeu_si512(values + (p * E + e) * 2 + 32, _mm512_unpackhi_epi16(one, other));
      }
    for (int64_t l = 0; l < rows; l++)
      for (int64_t e = 0; e < E; e += 16) store(sums + l * E + e, load<Sixteen>(sums + l * E + e) * factor[l]);
    for (int64_t e = 0; e < E; e += 16) {
      _tile_loadd(0, sums + e, E * 4);
      for (int64_t p = 0; p < PAIRS; p += 16) {
        _tile_loadd(1, weights + p * 2, TILE * 2);
        _tile_loadd(2, values + (p * E + e) * 2, E * 4);
        _tile_dpbf16ps(0, 1, 2);
      }
      _tile_stored(0, sums + e, E * 4);
    }
  }
  for (int64_t l = 0; l < rows; l++) {
    Type* row = out + of[l] * between + (first + l) / Q * E;
    for (int64_t e = 0; e < E; e++) {
      int64_t eight = e % 32 / 8, half = e % 8 / 4;
      float sum = sums[l * E + e / 32 * 32 + half * 16 + eight * 4 + e % 4];
      narrow(total[l] == 0 ? 0.0f : sum / total[l], row + e);
    }
  }
}
#endif

template <typename Type, typename Kept>
void attend(const Tensor& query, const Tensor& key, const Tensor& value, const std::vector<Seen>& seen, float scale,
            Type* out) {
  int64_t B = query.size(0), H = query.size(1), Q = query.size(2), D = query.size(3);
  int64_t N = key.size(1), E = value.size(3), G = H / N;
  Rows<Type> queries(query);
  Rows<Kept> keys(key), values(value);
  constexpr int64_t L = sizeof(Sixteen) / 4;
  int64_t parts = (G * Q + L - 1) / L;
  bool by_tiles = std::is_same_v<Kept, uint16_t> && D % 32 == 0 && E % 32 == 0 && tile_rows() == L;
  at::parallel_for(0, B * N * parts, 1, [&](int64_t start, int64_t stop) {
    std::optional<Tiles> set;
    if (by_tiles) set.emplace();
    for (int64_t i = start; i < stop; i++) {
      int64_t b = i / (N * parts), n = i / parts % N, first = i % parts * L;
      const Seen& reach = seen[std::min<int64_t>(b, seen.size() - 1)];
      Type* to = out + (b * Q * H + n * G) * E;
#if defined(__AMX_BF16__)
      if constexpr (std::is_same_v<Kept, uint16_t>) {
        if (by_tiles) {
          attend_by_tiles(queries, keys.at(b, n), keys.row, values.at(b, n), values.row, reach, b, n, G, Q, first, D, E,
                          scale, to, H * E);
          continue;
        }
      }
#endif
      (G * Q - first > 8 ? attend<Sixteen, SixteenIntegers, Type, Kept> : attend<Eight, EightIntegers, Type, Kept>)(
          queries, keys.at(b, n), keys.row, values.at(b, n), values.row, reach, b, n, G, Q, first, D, E, scale, to, H * E);
    }
  });
}

// query [B, H, Q, D], key [B, N, S, D] and value [B, N, S, E], in float32 or bfloat16, keys and values alike and no wider
// than queries; mask [1 or B, 1, 1 or Q, S or more], boolean or added to scores, without one all keys are seen. Returns
// [B, Q, H, E] in the type of queries.
Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                 double scale) {
  TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "rows must be in heads of texts");
  int64_t B = query.size(0), H = query.size(1), Q = query.size(2), D = query.size(3), S = key.size(2);
  at::ScalarType type = query.scalar_type(), kept = key.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "queries must be float32 or bfloat16, found ", type);
  TORCH_CHECK(kept == value.scalar_type() && (kept == type || kept == at::kBFloat16),
              "keys and values must be of one type, that of queries or bfloat16, found ", kept, " and ", value.scalar_type());
  for (const Tensor& x : {query, key, value}) {
    TORCH_CHECK(x.is_cpu(), "queries, keys and values must be on the CPU");
    TORCH_CHECK(x.size(0) == B && (x.size(3) == 1 || x.stride(3) == 1), "numbers of a row must lie side by side, found ",
                x.sizes(), " with strides ", x.strides());
  }
  TORCH_CHECK(key.size(1) > 0 && H % key.size(1) == 0 && key.size(3) == D && S > 0, "keys must fit queries, found ",
              key.sizes(), " for ", query.sizes());
  TORCH_CHECK(value.size(1) == key.size(1) && value.size(2) == S, "keys and values must be as many, found ", key.sizes(),
              " and ", value.sizes());
  std::vector<Seen> reach;
  if (!mask.has_value()) {
    reach.push_back({0, S, S, {}});
  } else {
    Tensor given = mask->scalar_type() == at::kBool || mask->scalar_type() == at::kBFloat16 ? *mask : mask->to(at::kFloat);
    bool fits = given.dim() == 4 && (given.size(0) == 1 || given.size(0) == B) && given.size(1) == 1 &&
                (given.size(2) == 1 || given.size(2) == Q) && given.size(3) >= S && given.is_cpu();
    TORCH_CHECK(fits, "a mask must be [1 or ", B, ", 1, 1 or ", Q, ", ", S, " or more], found ", mask->sizes());
    if (given.stride(3) != 1) given = given.contiguous();
    auto fill = [&](auto type) {
      using Mask = decltype(type);
      for (int64_t b = 0; b < given.size(0); b++)
        reach.push_back(seen((const Mask*)given.const_data_ptr() + b * given.stride(0),
                             given.size(2) == 1 ? 0 : given.stride(2), Q, S));
    };
    given.scalar_type() == at::kBool ? fill(bool()) : given.scalar_type() == at::kFloat ? fill(float()) : fill(uint16_t());
  }
  Tensor out = at::empty({B, Q, H, value.size(3)}, query.options());
  if (kept == at::kFloat) {
    attend<float, float>(query, key, value, reach, (float)scale, (float*)out.mutable_data_ptr());
  } else if (type == at::kFloat) {
    attend<float, uint16_t>(query, key, value, reach, (float)scale, (float*)out.mutable_data_ptr());
  } else {
    attend<uint16_t, uint16_t>(query, key, value, reach, (float)scale, (uint16_t*)out.mutable_data_ptr());
  }
  return out;
}

template <typename Type, typename Kept>
void put(const Tensor& given, const Tensor& buffer, int64_t first, int64_t start) {
  Rows<Type> rows(given);
  Kept* to = (Kept*)buffer.mutable_data_ptr() + first * buffer.stride(0) + start * buffer.stride(1);
  for (int64_t b = 0; b < given.size(0); b++)
    for (int64_t n = 0; n < given.size(1); n++)
      for (int64_t q = 0; q < given.size(2); q++) {
        const Type* row = rows.at(b, n) + q * rows.row;
        Kept* place = to + b * buffer.stride(0) + q * buffer.stride(1) + n * buffer.stride(2);
        for (int64_t d = 0; d < given.size(3); d++) narrow(wide(row[d]), place + d);
      }
}

// Writes keys and values of a pass, [B, N, Q, D] and [B, N, Q, E] in the type of queries, into buffers [texts, slots, N, D]
// and [.., E], from text `first` and slot `start` on, and attends to the slots before `span` of these texts.
Tensor attended(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys, const Tensor& values,
                const std::optional<Tensor>& mask, double scale, int64_t first, int64_t start, int64_t span) {
  auto reach = [&](const Tensor& given, const Tensor& buffer) {
    TORCH_CHECK(given.dim() == 4 && buffer.dim() == 4 && given.is_cpu() && buffer.is_cpu(), "rows must be in heads of texts");
    int64_t B = given.size(0), N = given.size(1), Q = given.size(2), D = given.size(3);
    bool fits = first >= 0 && first + B <= buffer.size(0) && start >= 0 && start + Q <= span && span <= buffer.size(1) &&
                N == buffer.size(2) && D == buffer.size(3) && given.stride(3) == 1 && buffer.stride(3) == 1;
    TORCH_CHECK(fits, "keys and values must fit their buffers, found ", given.sizes(), " for ", buffer.sizes(), " from text ",
                first, " and slot ", start, " on, ", span, " in reach");
    at::ScalarType type = given.scalar_type(), kept = buffer.scalar_type();
    TORCH_CHECK((type == at::kFloat || type == at::kBFloat16) && type == query.scalar_type() &&
                    (kept == type || kept == at::kBFloat16),
                "keys and values must have the type of queries, and buffers that or bfloat16, found ", type, " and ", kept);
    if (kept == at::kFloat)
      put<float, float>(given, buffer, first, start);
    else if (type == at::kFloat)
      put<float, uint16_t>(given, buffer, first, start);
    else
      put<uint16_t, uint16_t>(given, buffer, first, start);
    return at::as_strided(buffer, {B, N, span, D}, {buffer.stride(0), buffer.stride(2), buffer.stride(1), 1},
                          buffer.storage_offset() + first * buffer.stride(0));
  };
  return attention(query, reach(key, keys), reach(value, values), mask, scale);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(orthrus, library) {
  library.def("attention_" AS_TEXT(NAME) "(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor",
              &attention);
  library.def("attended_" AS_TEXT(NAME) "(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, "
              "Tensor? mask, float scale, int first, int start, int span) -> Tensor", &attended);
}

}  // namespace orthrus::attention
