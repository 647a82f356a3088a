#include "csrc/data/sidecar.h"

#include <filesystem>
#include <nlohmann/json.hpp>

#include "csrc/core/error.h"
#include "csrc/core/file.h"

namespace xlstm::data {
namespace {

using Json = nlohmann::ordered_json;
constexpr const char* kFormat = "libxlstm-tokens";

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  throw Error(ExitCode::kData, path + ": " + what +
                                   "; prepare the data again, or delete this file to read the "
                                   "tokens without it");
}

/// Typed access to the sidecar's keys, with messages that name file and key.
class Fields {
 public:
  Fields(const Json& json, const std::string& path) : json_(json), path_(path) {}

  std::string text(const char* key) const {
    const Json& value = find(key);
    if (!value.is_string()) refuse(path_, std::string("\"") + key + "\" is not a string");
    return value.get<std::string>();
  }
  int64_t integer(const char* key, int64_t minimum) const {
    const Json& value = find(key);
    return checked(value, key, minimum);
  }
  std::map<std::string, int64_t> counts(const char* key) const {
    const Json& value = find(key);
    if (!value.is_object()) refuse(path_, std::string("\"") + key + "\" is not an object");
    std::map<std::string, int64_t> result;
    for (const auto& [name, count] : value.items()) result[name] = checked(count, key, 0);
    return result;
  }

 private:
  const Json& find(const char* key) const {
    const auto found = json_.find(key);
    if (found == json_.end()) refuse(path_, std::string("\"") + key + "\" is missing");
    return *found;
  }
  int64_t checked(const Json& value, const char* key, int64_t minimum) const {
    const bool fits = value.is_number_integer() &&
                      !(value.is_number_unsigned() && value.get<uint64_t>() > INT64_MAX);
    if (!fits || value.get<int64_t>() < minimum)
      refuse(path_, std::string("\"") + key + "\" is not an integer of at least " +
                        std::to_string(minimum));
    return value.get<int64_t>();
  }
  const Json& json_;
  const std::string& path_;
};

}  // namespace

std::string format_sidecar(const Sidecar& sidecar) {
  Json json = Json::object();
  json["format"] = kFormat;
  const bool all_count = sidecar.loss_sha256.empty();
  json["version"] = all_count ? 1 : kSidecarVersion;
  json["bin_sha256"] = sidecar.bin_sha256;
  json["idx_sha256"] = sidecar.idx_sha256;
  if (!all_count) json["loss_sha256"] = sidecar.loss_sha256;
  json["tokenizer"] = sidecar.tokenizer;
  json["tokenizer_sha256"] = sidecar.tokenizer_sha256;
  json["vocab_size"] = sidecar.vocab_size;
  json["eos_id"] = sidecar.eos_id;
  json["num_tokens"] = sidecar.num_tokens;
  json["num_documents"] = sidecar.num_documents;
  json["max_token_id"] = sidecar.max_token_id;
  json["num_bytes"] = sidecar.num_bytes;
  if (!all_count) {
    json["num_counted_tokens"] = sidecar.num_counted_tokens;
    json["num_counted_bytes"] = sidecar.num_counted_bytes;
  }
  json["source_documents"] = sidecar.source_documents;
  json["command"] = sidecar.command;
  if (!sidecar.inputs_sha256.empty()) json["inputs_sha256"] = sidecar.inputs_sha256;
  // File names need not be UTF-8: bytes that are not become the replacement character.
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

std::optional<Sidecar> read_sidecar(const std::string& path) {
  std::error_code missing;
  if (!std::filesystem::exists(path, missing)) return std::nullopt;
  const Json json = Json::parse(read_file(path, ExitCode::kData), nullptr, false);
  if (json.is_discarded() || !json.is_object()) refuse(path, "is not a JSON object");
  const Fields fields(json, path);
  if (fields.text("format") != kFormat)
    refuse(path, std::string("\"format\" is not \"") + kFormat + "\"");
  const int64_t version = fields.integer("version", 1);
  if (version > kSidecarVersion)
    refuse(path, "version " + std::to_string(version) + " is newer than this program's " +
                     std::to_string(kSidecarVersion));
  Sidecar sidecar;
  sidecar.bin_sha256 = fields.text("bin_sha256");
  sidecar.idx_sha256 = fields.text("idx_sha256");
  sidecar.tokenizer = fields.text("tokenizer");
  sidecar.tokenizer_sha256 = fields.text("tokenizer_sha256");
  sidecar.vocab_size = fields.integer("vocab_size", 1);
  sidecar.eos_id = fields.integer("eos_id", -1);
  sidecar.num_tokens = fields.integer("num_tokens", 0);
  sidecar.num_documents = fields.integer("num_documents", 0);
  sidecar.max_token_id = fields.integer("max_token_id", -1);
  sidecar.num_bytes = fields.integer("num_bytes", 0);
  sidecar.num_counted_tokens = sidecar.num_tokens;
  sidecar.num_counted_bytes = sidecar.num_bytes;
  if (version > 1) {
    sidecar.loss_sha256 = fields.text("loss_sha256");
    sidecar.num_counted_tokens = fields.integer("num_counted_tokens", 0);
    sidecar.num_counted_bytes = fields.integer("num_counted_bytes", 0);
  }
  sidecar.source_documents = fields.counts("source_documents");
  sidecar.command = fields.text("command");
  if (json.contains("inputs_sha256")) sidecar.inputs_sha256 = fields.text("inputs_sha256");
  return sidecar;
}

}  // namespace xlstm::data
