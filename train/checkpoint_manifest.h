#pragma once
// MANIFEST.json: what a committed checkpoint folder holds. Its last member is the sha256 of all text before that
// member, so that a damaged manifest is told from a good one, whichever byte changed.
#include <cstdint>
#include <string>
#include <vector>

namespace xlstm::train {

inline constexpr const char* kManifestName = "MANIFEST.json";
inline constexpr const char* kModelName = "model.safetensors";
inline constexpr const char* kOptimizerName = "optim-rank00000.safetensors";
inline constexpr const char* kCarriedName = "carried.safetensors";  ///< with train.carry_state
inline constexpr const char* kTrainerName = "trainer.json";
inline constexpr const char* kConfigName = "config.yaml";
inline constexpr int64_t kCheckpointFormatVersion = 1;

struct ManifestEntry {
  std::string name;  ///< a plain file name of the folder
  int64_t bytes = 0;
  std::string sha256;  ///< 64 hexadecimal digits
};

struct Manifest {
  int64_t format_version = kCheckpointFormatVersion;
  std::vector<ManifestEntry> files;
  /// The entry of that name, or null.
  const ManifestEntry* find(const std::string& name) const;
};

std::string format_manifest(const Manifest& manifest);
/// Throws Error(kCheckpoint) naming the manifest: absent, damaged, of a newer format, or with a name that would leave
/// the folder.
Manifest read_manifest(const std::string& folder);
/// Every listed file is there, is a regular file (no link) and has its size. Throws Error(kCheckpoint) naming the file.
void check_manifest_sizes(const std::string& folder, const Manifest& manifest);
/// check_manifest_sizes, then the sha256 of every file.
void check_manifest_hashes(const std::string& folder, const Manifest& manifest);

}  // namespace xlstm::train
