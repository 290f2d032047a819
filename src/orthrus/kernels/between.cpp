// What stands between the products of a layer, each in one operation with the bits of torch's own several: norms and
// rotary embeddings. Numbers are rounded wherever torch rounds them. Put into recordings by rewritten.py.
//
// Shapes: R rows, C numbers of each.

#include <ATen/ops/rsqrt.h>

#include "operators.h"

namespace orthrus::between {
namespace {

typedef float Eight __attribute__((vector_size(32)));  // torch makes sums in such vectors everywhere
constexpr int64_t AT_ONCE = 1 << 13;  // numbers that a thread takes at least

inline Eight load(const float* p) {
  Eight v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename Type>
inline float as(float x) {  // to the nearest number of a type
  Type narrowed;
  narrow(x, &narrowed);
  return wide(narrowed);
}

// Sums of squares in the order of torch's sums: four chains of vectors, in levels of so many.
struct Four {
  Eight sum[4] = {};
  void add(const Four& other) {
    for (int i = 0; i < 4; i++) sum[i] += other.sum[i];
  }
};

float squares(const float* x, int64_t C) {
  int64_t vectors = C / 8, size = vectors / 4, power = 4;
  while (((int64_t)1 << (4 * (power + 1))) <= size) power++;  // a fourth of the size's logarithm
  int64_t step = (int64_t)1 << power;
  auto square = [&](int64_t v) {
    Eight some = load(x + v * 8);
    return some * some;
  };
  Four level[4];
  int64_t i = 0;
  while (i + step <= size) {
    for (int64_t j = 0; j < step; j++, i++)
      for (int k = 0; k < 4; k++) level[0].sum[k] += square(4 * i + k);
    for (int64_t j = 1; j < 4; j++) {
      level[j].add(level[j - 1]);
      level[j - 1] = Four();
      if (i & ((step - 1) << (j * power))) break;
    }
  }
  for (; i < size; i++)
    for (int k = 0; k < 4; k++) level[0].sum[k] += square(4 * i + k);
  for (int j = 1; j < 4; j++) level[0].add(level[j]);
  Eight sum = level[0].sum[0];
  for (int64_t v = size * 4; v < vectors; v++) sum += square(v);
  for (int k = 1; k < 4; k++) sum += level[0].sum[k];
  float total = 0;
  for (int64_t c = vectors * 8; c < C; c++) total += x[c] * x[c];
  for (int64_t l = 0; l < 8; l++) total += sum[l];
  return total;
}

// Rows of a tensor [.., C], each contiguous: where row r begins.
template <typename Type>
struct Rows {
  const Type* start;
  std::vector<int64_t> size, stride;
  int64_t count, C;
  explicit Rows(const Tensor& x) : start((const Type*)x.const_data_ptr()), count(1), C(x.size(-1)) {
    for (int64_t d = 0; d < x.dim() - 1; d++) size.push_back(x.size(d)), stride.push_back(x.stride(d)), count *= x.size(d);
  }
  const Type* at(int64_t r) const {
    int64_t offset = 0;
    for (int64_t d = size.size() - 1; d >= 0; r /= size[d--]) offset += r % size[d] * stride[d];
    return start + offset;
  }
};

void require(const Tensor& x, at::ScalarType type) {
  bool fits = x.is_cpu() && x.scalar_type() == type && x.dim() > 0 && (x.size(-1) == 1 || x.stride(-1) == 1);
  TORCH_CHECK(fits && (type == at::kFloat || type == at::kBFloat16), "rows must be float32 or bfloat16, all in ", type,
              ", their numbers side by side on the CPU, found ", x.sizes(), " in ", x.scalar_type());
}

template <typename Each>
void for_rows(int64_t rows, int64_t C, Each each) {
  at::parallel_for(0, rows, AT_ONCE / std::max<int64_t>(C, 1) + 1, [&](int64_t start, int64_t stop) {
    for (int64_t r = start; r < stop; r++) each(r);
  });
}

template <typename Run>
void by_type(const Tensor& like, Run run) {
  like.scalar_type() == at::kFloat ? run(float()) : run(uint16_t());
}

// x / sqrt(mean(x * x) + eps) * weight of each row, where what is multiplied by the weight is rounded before.
Tensor normed(const Tensor& x, const Tensor& weight, double eps) {
  require(x, x.scalar_type());
  require(weight, x.scalar_type());
  TORCH_CHECK(x.size(-1) >= 8, "rows must be 8 wide or more, found ", x.sizes());  // others are added up otherwise
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(-1), "weights must be ", x.size(-1), ", found ", weight.sizes());
  Tensor out = at::empty(x.sizes(), x.options());
  by_type(x, [&](auto type) {
    using Type = decltype(type);
    Rows<Type> rows(x);
    const Type* w = (const Type*)weight.const_data_ptr();
    Type* to = (Type*)out.mutable_data_ptr();
    Tensor mean = at::empty({rows.count}, at::kFloat);
    float* means = mean.mutable_data_ptr<float>();
    for_rows(rows.count, rows.C, [&](int64_t r) {
      const Type* row = rows.at(r);
      std::vector<float> floats(rows.C);
      for (int64_t c = 0; c < rows.C; c++) floats[c] = wide(row[c]);
      means[r] = squares(floats.data(), rows.C) / (float)rows.C + (float)eps;
    });
    Tensor root = at::rsqrt(mean);  // torch's own, which is no quotient of rounded numbers
    const float* factor = root.const_data_ptr<float>();
    for_rows(rows.count, rows.C, [&](int64_t r) {
      const Type* row = rows.at(r);
      for (int64_t c = 0; c < rows.C; c++) narrow(as<Type>(wide(row[c]) * factor[r]) * wide(w[c]), to + r * rows.C + c);
    });
  });
  return out;
}

template <typename Type>
void turn(const Type* __restrict row, const Type* __restrict cos, const Type* __restrict sin, int64_t half,
          Type* __restrict out) {
  for (int64_t i = 0; i < half; i++) {
    float x = wide(row[i]), y = wide(row[half + i]);
    narrow(as<Type>(x * wide(cos[i])) + as<Type>(-y * wide(sin[i])), out + i);
    narrow(as<Type>(y * wide(cos[half + i])) + as<Type>(x * wide(sin[half + i])), out + half + i);
  }
}

// Rows [B, H, Q, C] turned by angles: halves (x, y) become (x cos - y sin, y cos + x sin); cos and sin [1 or B, 1, Q, C].
Tensor rotated(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  require(x, x.scalar_type());
  TORCH_CHECK(x.dim() == 4 && x.size(3) % 2 == 0, "rows must be [B, H, Q, C], C even, found ", x.sizes());
  int64_t B = x.size(0), H = x.size(1), Q = x.size(2), C = x.size(3), half = C / 2;
  for (const Tensor& angle : {cos, sin}) {
    require(angle, x.scalar_type());
    bool fits = angle.dim() == 4 && (angle.size(0) == 1 || angle.size(0) == B) && angle.size(1) == 1 && angle.size(2) == Q &&
                angle.size(3) == C;
    TORCH_CHECK(fits, "angles must be [1 or ", B, ", 1, ", Q, ", ", C, "], found ", angle.sizes());
  }
  Tensor out = at::empty({B, Q, H, C}, x.options());
  by_type(x, [&](auto type) {
    using Type = decltype(type);
    const Type *from = (const Type*)x.const_data_ptr(), *cosines = (const Type*)cos.const_data_ptr(),
               *sines = (const Type*)sin.const_data_ptr();
    Type* to = (Type*)out.mutable_data_ptr();
    for_rows(B * Q, H * C, [&](int64_t r) {
      int64_t b = r / Q, q = r % Q;
      const Type* c = cosines + (cos.size(0) == 1 ? 0 : b) * cos.stride(0) + q * cos.stride(2);
      const Type* s = sines + (sin.size(0) == 1 ? 0 : b) * sin.stride(0) + q * sin.stride(2);
      for (int64_t h = 0; h < H; h++)
        turn(from + b * x.stride(0) + h * x.stride(1) + q * x.stride(2), c, s, half, to + (r * H + h) * C);
    });
  });
  return out.transpose(1, 2);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(orthrus, library) {
  library.def("normed_" AS_TEXT(NAME) "(Tensor x, Tensor weight, float eps) -> Tensor", &normed);
  library.def("rotated_" AS_TEXT(NAME) "(Tensor x, Tensor cos, Tensor sin) -> Tensor", &rotated);
}

}  // namespace orthrus::between
