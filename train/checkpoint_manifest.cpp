#include "train/checkpoint_manifest.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "csrc/core/error.h"
#include "csrc/core/file.h"
#include "csrc/core/sha256.h"

namespace xlstm::train {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr uint64_t kMaxManifestBytes = 16 << 20;
constexpr size_t kHashDigits = 64;
constexpr const char* kOwnHashKey = "\n  \"manifest_sha256\": \"";
constexpr const char* kTail = "\"\n}\n";

[[noreturn]] void refuse(const fs::path& file, const std::string& what) {
  throw Error(ExitCode::kCheckpoint, file.string() + ": " + what);
}

/// Adds the last member, which covers everything before it.
std::string seal(const std::string& body) { return body + kOwnHashKey + sha256_hex(body) + kTail; }

bool is_plain_name(const std::string& name) {
  return !name.empty() && name.size() <= 255 && name != "." && name != ".." &&
         name != kManifestName && name.find('/') == std::string::npos &&
         name.find('\0') == std::string::npos;
}

bool is_hash(const std::string& text) {
  return text.size() == kHashDigits &&
         text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

ManifestEntry parse_entry(const fs::path& path, const Json& json) {
  if (!json.is_object() || !json.contains("name") || !json["name"].is_string() ||
      !json.contains("bytes") || !json["bytes"].is_number_unsigned() || !json.contains("sha256") ||
      !json["sha256"].is_string())
    refuse(path, "an entry lacks name, bytes or sha256");
  ManifestEntry entry{json["name"].get<std::string>(), json["bytes"].get<int64_t>(),
                      json["sha256"].get<std::string>()};
  if (!is_plain_name(entry.name))
    refuse(path, "refused: it lists " + json["name"].dump() + ", which is no plain file name");
  if (entry.bytes < 0 || !is_hash(entry.sha256))
    refuse(path, "entry " + entry.name + " has no valid size or sha256");
  return entry;
}

Manifest parse_manifest(const fs::path& path, const std::string& text) {
  Json json;
  try {
    json = Json::parse(text);
  } catch (const Json::exception& error) {
    refuse(path, std::string("not a manifest: ") + error.what());
  }
  if (!json.is_object() || !json.contains("format_version") ||
      !json["format_version"].is_number_unsigned())
    refuse(path, "not a manifest: no format_version");
  Manifest manifest;
  manifest.format_version = json["format_version"].get<int64_t>();
  if (manifest.format_version != kCheckpointFormatVersion)
    refuse(path, "checkpoint format " + std::to_string(manifest.format_version) +
                     ", this program reads format " + std::to_string(kCheckpointFormatVersion) +
                     "; use the libxlstm version that wrote it or a newer one");
  if (!json.contains("files") || !json["files"].is_array())
    refuse(path, "not a manifest: no list of files");
  std::set<std::string> names;
  for (const Json& file : json["files"]) {
    manifest.files.push_back(parse_entry(path, file));
    if (!names.insert(manifest.files.back().name).second)
      refuse(path, "lists " + manifest.files.back().name + " twice");
  }
  return manifest;
}

}  // namespace

const ManifestEntry* Manifest::find(const std::string& name) const {
  const auto found =
      std::find_if(files.begin(), files.end(), [&](const auto& file) { return file.name == name; });
  return found == files.end() ? nullptr : &*found;
}

std::string format_manifest(const Manifest& manifest) {
  std::string body =
      "{\n  \"format_version\": " + std::to_string(manifest.format_version) + ",\n  \"files\": [";
  for (size_t i = 0; i < manifest.files.size(); ++i) {
    const ManifestEntry& file = manifest.files[i];
    body += std::string(i == 0 ? "" : ",") + "\n    {\"name\": " + Json(file.name).dump() +
            ", \"bytes\": " + std::to_string(file.bytes) + ", \"sha256\": \"" + file.sha256 + "\"}";
  }
  return seal(body + "\n  ],");
}

Manifest read_manifest(const std::string& folder) {
  const fs::path path = fs::path(folder) / kManifestName;
  std::error_code error;
  const auto status = fs::symlink_status(path, error);
  if (!fs::exists(status))
    refuse(folder, std::string("not a committed checkpoint: it has no ") + kManifestName);
  if (!fs::is_regular_file(status)) refuse(path, "not a regular file");
  if (fs::file_size(path, error) > kMaxManifestBytes || error)
    refuse(path, "too large for a manifest");
  const std::string text = read_file(path.string());
  const size_t tail_bytes = std::strlen(kOwnHashKey) + kHashDigits + std::strlen(kTail);
  if (text.size() < tail_bytes || seal(text.substr(0, text.size() - tail_bytes)) != text)
    refuse(path, "damaged: its content does not match its own checksum; use another checkpoint");
  return parse_manifest(path, text);
}

void check_manifest_sizes(const std::string& folder, const Manifest& manifest) {
  for (const ManifestEntry& file : manifest.files) {
    const fs::path path = fs::path(folder) / file.name;
    std::error_code error;
    const auto status = fs::symlink_status(path, error);
    if (!fs::exists(status))
      refuse(path, "missing, but listed in the manifest; use another checkpoint");
    if (!fs::is_regular_file(status)) refuse(path, "refused: not a regular file");
    const auto bytes = fs::file_size(path, error);
    if (error) refuse(path, "cannot be read: " + error.message());
    if (bytes != static_cast<uint64_t>(file.bytes))
      refuse(path, "damaged: " + std::to_string(bytes) + " bytes, the manifest says " +
                       std::to_string(file.bytes) + "; use another checkpoint");
  }
}

void check_manifest_hashes(const std::string& folder, const Manifest& manifest) {
  check_manifest_sizes(folder, manifest);
  for (const ManifestEntry& file : manifest.files) {
    const fs::path path = fs::path(folder) / file.name;
    if (sha256_file(path.string()) != file.sha256)
      refuse(path, "damaged: its sha256 differs from the manifest's; use another checkpoint");
  }
}

}  // namespace xlstm::train
