// The tokens of the highest scores, and drafts chosen in turn, where each slot's scores are shifted by the token before.
//
// Shapes: B rows, M slots, V tokens, R rank.

#include "operators.h"

namespace orthrus::choice {
namespace {

constexpr int64_t RUN = 512;   // scores whose highest is found before its place
constexpr int64_t SOME = 64;   // scores that are looked at together for one that a shift may make the highest
constexpr int64_t PARTS = 16;  // sums that a product of vectors is made of, whatever the CPU
constexpr int32_t INFINITE = 0x7f800000, SIZE = 0x7fffffff;

struct Place {
  float score;
  int64_t token;
};

// The highest score and the first token that has it; -1 where any is NaN, or the highest not finite.
template <typename Type>
Place highest(const Type* scores, int64_t V) {
  int32_t best = INT32_MIN, size = 0;
  int64_t run = 0;
  auto key = [](int32_t u) { return u ^ ((u >> 31) & SIZE); };  // integers in the order of the numbers
  auto at = [&](int64_t v) { return (int32_t)bits(wide(scores[v]) + 0.0f); };  // without a negative zero
  for (int64_t start = 0; start < V; start += RUN) {
    int32_t most = INT32_MIN;
    for (int64_t v = start; v < std::min(V, start + RUN); v++) {
      most = std::max(most, key(at(v)));
      size = std::max(size, at(v) & SIZE);
    }
    if (most > best) best = most, run = start;
  }
  float score = bits((uint32_t)key(best));
  if (size > INFINITE || !std::isfinite(score)) return {score, -1};
  while (key(at(run)) != best) run++;
  return {score, run};
}

template <typename Type>
float product(const float* one, const Type* other, int64_t R) {
  float part[PARTS] = {}, sum = 0;
  int64_t r = 0;
  for (; r + PARTS <= R; r += PARTS)
    for (int64_t i = 0; i < PARTS; i++) part[i] += one[r + i] * wide(other[r + i]);
  for (int64_t i = 0; r + i < R; i++) part[i] += one[r + i] * wide(other[r + i]);
  for (float each : part) sum += each;
  return sum;
}

// Moves a slot's choice to the token whose shifted score is the highest. A shift is no larger than the product of both
// vectors' lengths, so only tokens that could win are shifted.
template <typename Type, typename Factor>
void shift(const Type* scores, const float* before, const Factor* after, const float* length, int64_t V, int64_t R,
           Place& best) {
  float reach = 1.0001f * std::sqrt(product(before, before, R));  // more than rounding may add
  if (reach == 0 || best.token < 0) return;
  best.score += product(before, after + best.token * R, R);
  for (int64_t start = 0; start < V; start += SOME) {
    int64_t stop = std::min(V, start + SOME);
    int32_t some = 0;
    for (int64_t v = start; v < stop; v++) some |= wide(scores[v]) + reach * length[v] >= best.score;
    for (int64_t v = start; some && v < stop; v++) {
      if (!(wide(scores[v]) + reach * length[v] >= best.score)) continue;
      float score = wide(scores[v]) + product(before, after + v * R, R);
      if (score > best.score || (score == best.score && v < best.token)) best = {score, v};
    }
  }
}

// Tokens [B, M] of scores [B, M, V]; -1 where there is none. With anchors [B] and factors [V, R], the lengths [V] of the
// second one's rows beside them, each slot's scores are shifted by the token before it; 0 where there is none then.
Tensor chosen(const Tensor& scores, const std::optional<Tensor>& anchor, const std::optional<Tensor>& before,
              const std::optional<Tensor>& after, const std::optional<Tensor>& length) {
  bool served = scores.is_cpu() && scores.dim() == 3 && scores.size(2) > 0 && scores.stride(2) == 1;
  TORCH_CHECK(served, "scores must be [B, M, V] on the CPU, V side by side, found ", scores.sizes());
  bool narrow = scores.scalar_type() == at::kBFloat16;
  TORCH_CHECK(narrow || scores.scalar_type() == at::kFloat, "scores must be float32 or bfloat16");
  int64_t B = scores.size(0), M = scores.size(1), V = scores.size(2), R = before ? before->size(-1) : 0;
  Tensor out = at::empty({B, M}, scores.options().dtype(at::kLong));
  int64_t* to = out.mutable_data_ptr<int64_t>();
  auto run = [&](auto type, auto factor) {
    using Type = decltype(type);
    using Factor = decltype(factor);
    auto kind = std::is_same_v<Factor, float> ? at::kFloat : at::kBFloat16;
    const int64_t* anchors = at_start<int64_t>(anchor, "anchor", at::kLong, B);
    const float *first = at_start<float>(before, "before", at::kFloat, V * R),
                *lengths = at_start<float>(length, "length", at::kFloat, V);
    const Factor* second = at_start<Factor>(after, "after", kind, V * R);
    auto slot = [&](int64_t b, int64_t m) {
      return (const Type*)scores.const_data_ptr() + b * scores.stride(0) + m * scores.stride(1);
    };
    std::vector<Place> best(B * M);
    at::parallel_for(0, B * M, 1, [&](int64_t start, int64_t stop) {
      for (int64_t i = start; i < stop; i++) best[i] = highest(slot(i / M, i % M), V), to[i] = best[i].token;
    });
    if (!anchors) return;
    TORCH_CHECK(first && second && lengths, "factors and lengths must come with anchors");
    at::parallel_for(0, B, 1, [&](int64_t start, int64_t stop) {
      for (int64_t b = start; b < stop; b++) {
        int64_t token = anchors[b];
        for (int64_t m = 0; m < M; m++) {
          TORCH_CHECK(token >= 0 && token < V, "tokens must be from 0 to ", V - 1, ", found ", token);
          shift(slot(b, m), first + token * R, second, lengths, V, R, best[b * M + m]);
          to[b * M + m] = token = std::max<int64_t>(best[b * M + m].token, 0);
        }
      }
    });
  };
  auto by_factor = [&](auto type) {
    after && after->scalar_type() == at::kBFloat16 ? run(type, uint16_t()) : run(type, float());
  };
  narrow ? by_factor(uint16_t()) : by_factor(float());
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(orthrus, library) {
  library.def("chosen_" AS_TEXT(NAME)
              "(Tensor scores, Tensor? anchor, Tensor? before, Tensor? after, Tensor? length) -> Tensor", &chosen);
}

}  // namespace orthrus::choice
