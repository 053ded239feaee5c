// SPDX-License-Identifier: Apache-2.0
// What the launcher hands to the CPU and GPU kernels. No torch headers, no GPU headers.
#pragma once

#include <cstdint>

namespace mla_fusion {

enum class ActType : int32_t { kFloat32, kFloat16, kBFloat16 };

enum class CacheKind : int32_t {
  kCopy,     // same type as the activations
  kFp8E4M3,  // value / *kv_cache_scale, saturated; OCP formats
  kFp8E5M2,
  kFp8E4M3Fnuz,  // the same in the formats of AMD's gfx94x; not in CUDA builds
  kFp8E5M2Fnuz,
  kFp8DsMla,  // rows of kDsMla*: each tile of the latent in e4m3 with a scale of its own, the key unquantised
};

// How the normalised query is given to q_b.
enum class QueryQuant : int32_t {
  kNone,    // in the activation type
  kGroup,   // e4m3, divided by a scale of each kQueryGroup values
  kToken,   // e4m3, divided by a scale of the row
  kStatic,  // e4m3, multiplied by the reciprocal of a scale that is given
};

constexpr int kQueryGroup = 128;

// A row of fp8_ds_mla in bytes, as sparse attention reads it: latent, float32 scales of its tiles, key in 16 bits.
constexpr int kDsMlaLoraRank = 512;
constexpr int kDsMlaRotDim = 64;
constexpr int kDsMlaTile = 128;
constexpr int kDsMlaScales = kDsMlaLoraRank;
constexpr int kDsMlaKey = kDsMlaScales + kDsMlaLoraRank / kDsMlaTile * 4;
constexpr int kDsMlaRowBytes = kDsMlaKey + kDsMlaRotDim * 2;

// One access of a lane of the vector kernels.
constexpr int kVectorBytes = 16;

// The RMSNorm of the query's latent, before q_b.
struct QueryNormParams {
  const void* in;                 // [num_tokens, rank], or null: no such norm
  const void* weight;             // [rank]
  void* out;                      // [num_tokens, rank], contiguous
  float* scales;                  // of kGroup and kToken: [num_tokens, scales of a row], written
  const float* static_scale;      // of kStatic: one value
  int64_t token_stride;
  int64_t scale_token_stride;
  int64_t scale_group_stride;
  int32_t rank;
  float inverse_rank;
  float epsilon;
  float smallest;                 // of kGroup and kToken: as what the largest magnitude counts at least
  QueryQuant quant;
  bool rounds_twice;              // to the activation type before the weight too
  bool scales_are_powers_of_two;  // of kGroup: rounded up
};

// What a call does is what it has: the query's heads, the key and the latent (together, with their cache rows), the
// query's norm. Strides count elements of the tensor that they belong to.
struct Params {
  void* q_pe;                     // [num_tokens, num_heads, rot_dim], rotated in place; null: no query, num_heads is 0
  const void* k_pe;               // [num_tokens, rot_dim]; null: no key and no latent
  const void* kv_c;               // [num_tokens, lora_rank]
  const void* kv_c_weight;        // [lora_rank], or null: kv_c is cached as it is, without RMSNorm
  void* kv_c_out;                 // [num_tokens, lora_rank], contiguous: the normalised latent; null without norm
  void* k_pe_out;                 // [num_tokens, rot_dim], contiguous
  void* kv_cache;                 // [num_blocks, block_size, lora_rank + rot_dim], or kDsMlaRowBytes per row
  const void* positions;          // [num_tokens]
  const void* cos_sin_cache;      // [max_pos, rot_dim]: cos in the first half of a row, sin in the second
  const int64_t* slot_mapping;    // [num_slots]; negative: the row is not cached
  const float* kv_cache_scale;    // one value, read on the device by the fp8 kinds but kFp8DsMla

  int64_t q_token_stride;
  int64_t q_head_stride;
  int64_t k_token_stride;
  int64_t kv_token_stride;
  int64_t cos_sin_stride;
  int64_t cache_block_stride;
  int64_t cache_row_stride;

  int64_t num_tokens;
  int64_t num_slots;              // <= num_tokens; tokens behind it write no cache row
  uint32_t block_size;
  uint32_t block_factor;          // slot / block_size == slot * block_factor >> block_shift, in 64 bits
  int32_t block_shift;
  int32_t column_shift;           // log2 of the lanes that share a head, each with 16 bytes of it
  int32_t num_heads;
  int32_t rot_dim;
  int32_t lora_rank;
  float inverse_lora_rank;
  float epsilon;                  // of the RMSNorm

  ActType act_type;
  CacheKind cache_kind;
  bool is_neox;
  bool cos_sin_is_float;          // else the activation type
  bool positions_are_int32;       // else int64

  QueryNormParams query_norm;
};

// Tokens begin <= t < end, on the calling thread.
void run_cpu(const Params& params, int64_t begin, int64_t end);

#ifdef MLA_FUSION_GPU
// Returns 0 or the runtime's error code, for which gpu_error_name gives the text.
int launch_gpu(const Params& params, void* stream);
const char* gpu_error_name(int code);
#endif

}  // namespace mla_fusion
