#include "csrc/core/safetensors.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>

#include "csrc/core/error.h"
#include "csrc/core/file.h"
#include "csrc/core/sha256.h"

namespace xlstm {
namespace {

using Json = nlohmann::json;

struct DtypeName {
  at::ScalarType dtype;
  const char* name;
};
constexpr std::array<DtypeName, 10> kDtypes{{{at::kDouble, "F64"},
                                             {at::kFloat, "F32"},
                                             {at::kHalf, "F16"},
                                             {at::kBFloat16, "BF16"},
                                             {at::kLong, "I64"},
                                             {at::kInt, "I32"},
                                             {at::kShort, "I16"},
                                             {at::kChar, "I8"},
                                             {at::kByte, "U8"},
                                             {at::kBool, "BOOL"}}};
constexpr size_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the reference implementation

const char* dtype_name(at::ScalarType dtype) {
  for (const auto& entry : kDtypes)
    if (entry.dtype == dtype) return entry.name;
  throw Error(ExitCode::kCheckpoint,
              std::string("safetensors cannot hold dtype ") + c10::toString(dtype));
}

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  throw Error(ExitCode::kCheckpoint, path + ": not a valid safetensors file: " + what);
}

int64_t unsigned_field(const Json& value, const std::string& path, const std::string& what) {
  if (!value.is_number_unsigned() || value.get<uint64_t>() > (uint64_t{1} << 62))
    refuse(path, what + " is not a size");
  return static_cast<int64_t>(value.get<uint64_t>());
}

/// Parses JSON and refuses duplicate keys, which nlohmann would resolve silently.
Json parse_header(const std::string& path, const char* begin, const char* end) {
  std::vector<std::set<std::string>> keys;
  std::string duplicate;
  const auto callback = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > 8) refuse(path, "header nested too deeply");
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key && !keys.back().insert(parsed.get<std::string>()).second)
      duplicate = parsed.get<std::string>();
    return true;
  };
  Json header;
  try {
    header = Json::parse(begin, end, callback);
  } catch (const Json::exception& error) {
    refuse(path, std::string("header: ") + error.what());
  }
  if (!duplicate.empty()) refuse(path, "duplicate name " + duplicate);
  if (!header.is_object()) refuse(path, "header is not an object");
  return header;
}

}  // namespace

std::string write_safetensors(const ByteSink& sink, const NamedTensors& tensors,
                              const std::map<std::string, std::string>& metadata) {
  Json header = Json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  size_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    if (header.contains(name))
      throw Error(ExitCode::kCheckpoint, "safetensors: two tensors are named " + name);
    const size_t end = offset + tensor.nbytes();
    header[name] = {{"dtype", dtype_name(tensor.scalar_type())},
                    {"shape", tensor.sizes().vec()},
                    {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = header.dump();
  text.append((kLengthBytes - text.size() % kLengthBytes) % kLengthBytes, ' ');  // aligns the data
  uint64_t length = text.size();
  char prefix[kLengthBytes];
  for (char& byte : prefix) {
    byte = static_cast<char>(length & 0xff);
    length >>= 8;
  }

  Sha256 hash;
  const auto put = [&](const void* data, size_t size) {
    sink(data, size);
    hash.update(data, size);
  };
  put(prefix, sizeof prefix);
  put(text.data(), text.size());
  for (const auto& entry : tensors) {
    const at::Tensor dense = entry.second.detach().to(at::kCPU).contiguous();
    put(dense.const_data_ptr(), dense.nbytes());
  }
  return hash.hex_digest();
}

std::string save_safetensors(const std::string& path, const NamedTensors& tensors,
                             const std::map<std::string, std::string>& metadata) {
  OutputFile file(path);
  std::string sha256 = write_safetensors(
      [&](const void* data, size_t size) { file.write(data, size); }, tensors, metadata);
  file.sync_and_close();
  return sha256;
}

SafetensorsFile load_safetensors(const std::string& path) {
  auto map = std::make_shared<MappedFile>(path);
  if (map->size() < kLengthBytes) refuse(path, "shorter than its own header");
  uint64_t header_bytes = 0;
  for (size_t i = kLengthBytes; i-- > 0;) header_bytes = header_bytes << 8 | map->data()[i];
  if (header_bytes > kMaxHeaderBytes || header_bytes > map->size() - kLengthBytes)
    refuse(path, "header length");
  const char* begin = reinterpret_cast<const char*>(map->data()) + kLengthBytes;
  const Json header = parse_header(path, begin, begin + header_bytes);
  const int64_t data_bytes = static_cast<int64_t>(map->size() - kLengthBytes - header_bytes);
  const unsigned char* data = map->data() + kLengthBytes + header_bytes;

  SafetensorsFile result;
  std::vector<std::tuple<int64_t, int64_t, std::string>> ranges;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") {
      if (!entry.is_object()) refuse(path, "__metadata__ is not an object");
      for (const auto& [key, value] : entry.items()) {
        if (!value.is_string()) refuse(path, "__metadata__." + key + " is not a string");
        result.metadata[key] = value.get<std::string>();
      }
      continue;
    }
    if (!entry.is_object() || !entry.contains("dtype") || !entry["dtype"].is_string() ||
        !entry.contains("shape") || !entry["shape"].is_array() || !entry.contains("data_offsets") ||
        !entry["data_offsets"].is_array() || entry["data_offsets"].size() != 2)
      refuse(path, "entry " + name);
    const auto dtype_text = entry["dtype"].get<std::string>();
    const auto found = std::find_if(kDtypes.begin(), kDtypes.end(),
                                    [&](const auto& d) { return dtype_text == d.name; });
    if (found == kDtypes.end()) refuse(path, name + ": dtype " + dtype_text);
    std::vector<int64_t> shape;
    int64_t count = 1;
    for (const auto& size : entry["shape"]) {
      shape.push_back(unsigned_field(size, path, name + ": shape"));
      if (__builtin_mul_overflow(count, shape.back(), &count))
        refuse(path, name + ": shape overflows");
    }
    const int64_t first = unsigned_field(entry["data_offsets"][0], path, name + ": offset");
    const int64_t last = unsigned_field(entry["data_offsets"][1], path, name + ": offset");
    int64_t bytes = 0;
    if (__builtin_mul_overflow(count, static_cast<int64_t>(c10::elementSize(found->dtype)),
                               &bytes) ||
        first > last || last > data_bytes || last - first != bytes)
      refuse(path, name + ": byte range does not fit dtype, shape and file");
    ranges.emplace_back(first, last, name);
    void* pointer = const_cast<unsigned char*>(data + first);
    const auto options = at::TensorOptions().dtype(found->dtype);
    at::Tensor tensor;
    if (reinterpret_cast<uintptr_t>(pointer) % c10::elementSize(found->dtype) == 0) {
      tensor = at::from_blob(
          pointer, shape, [map](void*) {}, options);
    } else {  // a header of odd length: typed access needs alignment
      tensor = at::empty(shape, options);
      std::memcpy(tensor.data_ptr(), pointer, static_cast<size_t>(bytes));
    }
    result.tensors.emplace(name, tensor);
  }
  std::sort(ranges.begin(), ranges.end());
  int64_t expected = 0;
  for (const auto& [first, last, name] : ranges) {
    if (first != expected) refuse(path, name + ": gap or overlap before its data");
    expected = last;
  }
  if (expected != data_bytes)
    refuse(path, "data ends early or bytes follow the last tensor (truncated or extended file)");
  return result;
}

}  // namespace xlstm
