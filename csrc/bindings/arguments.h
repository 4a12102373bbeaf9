// SPDX-License-Identifier: Apache-2.0
// Arguments under the names by which callers know them, and errors that say what was expected of them and what was given.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace mqa_sm90 {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kAlignment = 16;  // bytes, of every address that TMA or a vector access starts from

// A tensor under the name by which the caller knows it.
struct Argument {
  const char* name;
  const Tensor& tensor;
};

std::string list_of(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << ']';
  return text.str();
}

// A dtype as torch prints it, for those that a caller is likely to hold.
std::string name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    default: return toString(dtype);
  }
}

// What an error says was given.
std::string dtype_of(const Tensor& tensor) { return "dtype " + name_of(tensor.scalar_type()); }
std::string shape_of(const Tensor& tensor) { return "shape " + list_of(tensor.sizes()); }
std::string strides_of(const Tensor& tensor) {
  return "shape " + list_of(tensor.sizes()) + " with strides " + list_of(tensor.strides());
}
std::string address_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "address " << tensor.data_ptr();
  return text.str();
}
std::string device_of(const Tensor& tensor) {
  if (tensor.is_cuda()) return "device cuda:" + std::to_string(tensor.get_device_index());
  return tensor.is_cpu() ? "device cpu" : "a device that is neither cuda nor cpu";
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <typename... Expected>
[[noreturn]] void fail(const char* argument, const std::string& given, const Expected&... expected) {
  std::ostringstream text;
  text << "vllm_mqa_sm90: " << argument << ": expected ";
  (text << ... << expected);
  text << ", given " << given;
  throw std::runtime_error(text.str());
}

template <typename... Expected>
void require(bool holds, const Argument& argument, std::string (*given)(const Tensor&), const Expected&... expected) {
  if (!holds) fail(argument.name, given(argument.tensor), expected...);
}

template <typename... Expected>
void require(bool holds, const char* argument, int64_t given, const Expected&... expected) {
  if (!holds) fail(argument, std::to_string(given), expected...);
}

void require_dtype(const Argument& argument, ScalarType dtype) {
  require(argument.tensor.scalar_type() == dtype, argument, dtype_of, "dtype ", name_of(dtype));
}

void require_contiguous(const Argument& argument) {
  require(argument.tensor.is_contiguous(), argument, strides_of, "a contiguous tensor");
}

void require_aligned(const Argument& argument) {
  require(reinterpret_cast<uintptr_t>(argument.tensor.data_ptr()) % kAlignment == 0, argument, address_of,
          "an address that is a multiple of ", kAlignment, " bytes");
}

void require_same_device(const Argument& argument, const Argument& reference) {
  const Tensor &tensor = argument.tensor, &other = reference.tensor;
  require(tensor.is_cuda() == other.is_cuda() && tensor.is_cpu() == other.is_cpu() &&
              tensor.get_device_index() == other.get_device_index(),
          argument, device_of, device_of(other), ", as ", reference.name);
}

// A matrix of that shape, whose rows may lie apart.
void require_rows(const Argument& argument, ScalarType dtype, int64_t rows, int64_t columns) {
  const Tensor& tensor = argument.tensor;
  require_dtype(argument, dtype);
  require(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, argument, shape_of, "shape [", rows,
          ", ", columns, "]");
  require(columns <= 1 || tensor.stride(1) == 1, argument, strides_of, "a last stride of 1");
  require(rows <= 1 || tensor.stride(0) >= columns, argument, strides_of, "rows that do not overlap");
}

void require_vector(const Argument& argument) {
  require_dtype(argument, ScalarType::Int);
  require(argument.tensor.dim() == 1, argument, shape_of, "one dimension");
  require_contiguous(argument);
}

}  // namespace
}  // namespace mqa_sm90
