// Files read whole: what cannot be read is an error, never a shorter file.
#include "csrc/core/file.h"

#include <cerrno>
#include <fstream>

#include "csrc/core/error.h"
#include "tests/support/catch.h"
#include "tests/support/temporary_folder.h"

namespace xlstm {
namespace {

std::string refusal(const std::string& path) {
  try {
    read_file(path);
  } catch (const Error& error) {
    CHECK(error.code == ExitCode::kCheckpoint);
    return error.what();
  }
  return "";
}

TEST_CASE("a file is read whole") {
  const testing::TemporaryFolder folder;
  const std::string path = (folder / "file").string();
  for (const size_t size : {0, 1, 65535, 65536, 65537, 1'000'000}) {
    std::string bytes(size, '\0');
    for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<char>(i % 251);
    std::ofstream(path, std::ios::binary) << bytes;
    CHECK(read_file(path) == bytes);
  }
  CHECK(read_file("/proc/self/cmdline").size() > 1);  // its size is not known before
}

TEST_CASE("what is no readable file is refused by name") {
  const testing::TemporaryFolder folder;
  CHECK(refusal((folder / "absent").string()) ==
        (folder / "absent").string() + ": cannot open: No such file or directory");
  CHECK(refusal(folder.string()) == folder.string() + ": a folder, expected a file");
  CHECK(refusal("/proc/self/mem") == "/proc/self/mem: cannot read: Input/output error");
}

TEST_CASE("two folders change places") {
  const testing::TemporaryFolder folder;
  const auto a = folder / "a", b = folder / "b";
  std::filesystem::create_directory(a), std::filesystem::create_directory(b);
  std::ofstream(a / "of_a"), std::ofstream(b / "of_b");
  REQUIRE(exchange_paths(a.string(), b.string()));
  CHECK((exists(a / "of_b") && exists(b / "of_a")));
  CHECK(!exchange_paths(a.string(), (folder / "absent").string()));
  CHECK(exists(a / "of_b"));
}

}  // namespace
}  // namespace xlstm
