#pragma once
// The safetensors file format: 8-byte little-endian header length, JSON header, raw tensor bytes.
#include <ATen/core/Tensor.h>

#include <cstddef>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace xlstm {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;
using ByteSink = std::function<void(const void* data, size_t size_bytes)>;

/// The bytes of a file for `sink`, in pieces, and their sha256; tensors and metadata as below.
std::string write_safetensors(const ByteSink& sink, const NamedTensors& tensors,
                              const std::map<std::string, std::string>& metadata = {});

/// Writes tensors (any device, any strides; float64/32/16, bfloat16, int64/32/16/8, uint8, bool) in the given order,
/// synced to disk, and returns the sha256 of the file. Throws std::system_error from the file system.
std::string save_safetensors(const std::string& path, const NamedTensors& tensors,
                             const std::map<std::string, std::string>& metadata = {});

struct SafetensorsFile {
  std::map<std::string, at::Tensor>
      tensors;  ///< CPU; they share one memory map that lives as long as any of them
  std::map<std::string, std::string> metadata;
};

/// Reads and checks a file: header size, JSON, dtype, shape against byte range, gaps, overlaps, duplicates.
/// Throws Error(kCheckpoint) naming the file and what is wrong. Never allocates more than the file's size.
/// Tensors are read-only views of the map: clone() before writing.
SafetensorsFile load_safetensors(const std::string& path);

}  // namespace xlstm
