// Attention of few query rows over cached keys, in float32 or bfloat16, or in float32 over such in bfloat16, summed in
// float32.
//
// Each lane of a vector is a query row, so that a row's sums are made in one order, that of keys, whatever the number
// of rows, their neighbours, the threads and the slots that a row does not see.
//
// Shapes: B texts, N key heads, G queries of each, Q query rows, S keys, D and E sizes of keys and values.

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
    for (int64_t s = std::max(tile, seen.plain); s < tile + keys; s++)
      for (int64_t l = 0; l < rows; l++) weights[(s - tile) * L + l] += seen.mask[(s - seen.plain) * Q + of[l]];
    V before = most;
    for (k = 0; k < keys; k++) most = at_least(most, load<V>(weights + k * L));
    V factor = exponential<V, Integers>(before - most);
    total *= factor;
    for (k = 0; k < keys; k++) {
      V weight = exponential<V, Integers>(load<V>(weights + k * L) - most);
      total += weight;
      store(weights + k * L, weight);
    }
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

template <typename Type, typename Kept>
void attend(const Tensor& query, const Tensor& key, const Tensor& value, const std::vector<Seen>& seen, float scale,
            Type* out) {
  int64_t B = query.size(0), H = query.size(1), Q = query.size(2), D = query.size(3);
  int64_t N = key.size(1), E = value.size(3), G = H / N;
  Rows<Type> queries(query);
  Rows<Kept> keys(key), values(value);
  constexpr int64_t L = sizeof(Sixteen) / 4;
  int64_t parts = (G * Q + L - 1) / L;
  at::parallel_for(0, B * N * parts, 1, [&](int64_t start, int64_t stop) {
    for (int64_t i = start; i < stop; i++) {
      int64_t b = i / (N * parts), n = i / parts % N, first = i % parts * L;
      (G * Q - first > 8 ? attend<Sixteen, SixteenIntegers, Type, Kept> : attend<Eight, EightIntegers, Type, Kept>)(
          queries, keys.at(b, n), keys.row, values.at(b, n), values.row, seen[std::min<int64_t>(b, seen.size() - 1)], b, n,
          G, Q, first, D, E, scale, out + (b * Q * H + n * G) * E, H * E);
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

}  // namespace

TORCH_LIBRARY_FRAGMENT(orthrus, library) {
  library.def("attention_" AS_TEXT(NAME) "(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor",
              &attention);
}

}  // namespace orthrus::attention
