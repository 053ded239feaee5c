// SPDX-License-Identifier: Apache-2.0
// Checks of tensors. An error says which argument, what was expected, what came and what to do.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/macros/Export.h>

#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace mla_fusion {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// No iostreams: where a toolchain links libstdc++ statically, two copies of its locales meet and number output crashes.
inline std::string text(std::string_view part) { return std::string(part); }
inline std::string text(int64_t part) { return std::to_string(part); }
inline std::string text(double part) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%g", part);
  return digits;
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::runtime_error("mla_fusion: " + (text(parts) + ...));
}

inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    case ScalarType::Float8_e4m3fnuz:
      return "float8_e4m3fnuz";
    case ScalarType::Float8_e5m2fnuz:
      return "float8_e5m2fnuz";
    default:
      return "dtype number " + std::to_string(static_cast<int>(type));
  }
}

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string joined;
  for (const int64_t size : sizes) joined += (joined.empty() ? "" : ", ") + std::to_string(size);
  return "[" + joined + "]";
}

inline std::string shape_text(const Tensor& tensor) { return shape_text(tensor.sizes()); }

inline void check_dtype(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> accepted) {
  std::string expected;
  for (const ScalarType type : accepted) {
    if (tensor.scalar_type() == type) return;
    expected += (expected.empty() ? "" : " or ") + dtype_name(type);
  }
  fail(name, " must have dtype ", expected, ", got ", dtype_name(tensor.scalar_type()), "; convert it before the call");
}

// kAny matches every size.
inline constexpr int64_t kAny = -1;

inline void check_shape(const char* name, const Tensor& tensor, const char* meaning, std::initializer_list<int64_t> expected) {
  bool matches = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t axis = 0;
  for (const int64_t size : expected) {
    matches = matches && (size == kAny || tensor.size(axis) == size);
    ++axis;
  }
  if (matches) return;
  std::string sizes;
  for (const int64_t size : expected) {
    sizes += (sizes.empty() ? "" : ", ") + (size == kAny ? std::string("any") : std::to_string(size));
  }
  fail(name, " must be ", meaning, " = [", sizes, "], got ", shape_text(tensor), "; pass a view or slice of that shape");
}

inline void check_last_dim_contiguous(const char* name, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) > 1 && tensor.stride(last) != 1) {
    fail(name, " must have a contiguous last dimension (stride 1), got stride ", tensor.stride(last), "; call .contiguous()");
  }
}

// The tensor by which the others are judged: its dtype is the activations', its device that of the call.
struct C10_HIDDEN Lead {
  const char* name;
  const Tensor& tensor;
};

inline void check_device(const char* name, const Tensor& tensor, const Lead& lead) {
  if (tensor.is_cpu() == lead.tensor.is_cpu() && tensor.get_device_index() == lead.tensor.get_device_index()) return;
  const auto device_name = [](const Tensor& t) {
    return t.is_cpu() ? std::string("cpu") : "gpu " + std::to_string(t.get_device_index());
  };
  fail(name, " must be on the device of ", lead.name, " (", device_name(lead.tensor), "), got ", device_name(tensor), "; move it before the call");
}

// Activations are in the lead's dtype, and a last dimension is read as it lies.
inline void check_activations(const char* name, const Tensor& tensor, const Lead& lead) {
  check_dtype(name, tensor, {lead.tensor.scalar_type()});
  check_device(name, tensor, lead);
  check_last_dim_contiguous(name, tensor);
}

inline void check_output(const char* name, const Tensor& tensor, const char* meaning, std::initializer_list<int64_t> expected) {
  check_shape(name, tensor, meaning, expected);
  if (!tensor.is_contiguous()) fail(name, " must be contiguous; allocate it with torch.empty");
}

}  // namespace mla_fusion
