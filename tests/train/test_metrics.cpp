#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "csrc/core/file.h"
#include "tests/support/catch.h"
#include "tests/support/temporary_folder.h"
#include "train/metrics.h"

using namespace xlstm;
using namespace xlstm::train;

namespace {

std::vector<nlohmann::json> read_lines(const std::filesystem::path& path) {
  std::vector<nlohmann::json> lines;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) lines.push_back(nlohmann::json::parse(line));
  return lines;
}

}  // namespace

TEST_CASE("the console line") {
  ConsoleStep step{.step = 120,
                   .total_steps = 2000,
                   .loss = 4.83121,
                   .grad_norm = 0.807,
                   .learning_rate = 1.6e-4,
                   .tokens_per_s = 41234,
                   .data_fraction = 0.012,
                   .seconds_left = 133};
  CHECK(format_step(step) ==
        "step 120/2000 | loss 4.8312 | ppl 125.4 | gnorm 0.81 | lr 1.6e-04 | 41.2k tok/s | data 1% "
        "| eta 2m13s");
  CHECK(format_bar_line(step) ==
        "[#...................] 120/2000 | eta 2m13s | loss 4.8312 | 41.2k tok/s | lr 1.6e-04 | "
        "gnorm 0.81");
  step.tokens_per_s = 0;
  step.seconds_left = -1;
  step.loss = 20;
  CHECK(format_step(step) ==
        "step 120/2000 | loss 20.0000 | ppl 4.85e+08 | gnorm 0.81 | lr 1.6e-04");
  step.loss = step.grad_norm = std::nullopt;  // no target counts
  CHECK(format_step(step) == "step 120/2000 | loss - | gnorm - | lr 1.6e-04");
  CHECK(format_bar_line(step) == "[#...................] 120/2000 | loss - | lr 1.6e-04 | gnorm -");
}

TEST_CASE("numbers for people") {
  CHECK(format_thousands(0) == "0");
  CHECK(format_thousands(999) == "999");
  CHECK(format_thousands(1000) == "1,000");
  CHECK(format_thousands(6865424896) == "6,865,424,896");
  CHECK(format_thousands(-123456) == "-123,456");
  CHECK(format_count(950) == "950");
  CHECK(format_count(999.7) == "1k");
  CHECK(format_count(41234) == "41.2k");
  CHECK(format_count(1.53e6) == "1.53M");
}

TEST_CASE("CRC-32C of the published test vectors") {
  CHECK(crc32c("123456789", 9) == 0xE3069283u);
  CHECK(crc32c(std::string(32, '\0').data(), 32) == 0x8A9136AAu);
  CHECK(crc32c(std::string(32, '\xff').data(), 32) == 0x62A8AB43u);
  CHECK(crc32c("", 0) == 0u);
}

TEST_CASE("JSON lines hold every bit of the loss and survive values that are not finite") {
  const testing::TemporaryFolder folder;
  const std::string path = folder / "metrics.jsonl";
  const double loss = 1.0 / 3;
  {
    JsonlWriter writer(path);
    writer.write_metrics(7, {{"train/loss", loss}, {"train/lr", 1e-3}});
    writer.write_metrics(8, {{"train/loss", std::numeric_limits<double>::quiet_NaN()}});
    writer.write_metrics(8, {{"val/loss", loss}});
    writer.write_event("resume", 8, {{"checkpoint", "a \"b\" \xff"}});
  }
  const auto lines = read_lines(path);
  REQUIRE(lines.size() == 4);
  CHECK(lines[0]["step"] == 7);
  CHECK(std::strtod(lines[0]["train/loss_hex"].get<std::string>().c_str(), nullptr) == loss);
  CHECK(lines[1]["train/loss"].is_null());
  CHECK(std::strtod(lines[2]["val/loss_hex"].get<std::string>().c_str(), nullptr) == loss);
  CHECK(lines[3]["event"] == "resume");
  CHECK(last_value(path, "train/loss") == Approx(loss));
  CHECK(std::isnan(last_value(path, "val/ppl")));
}

TEST_CASE("truncation keeps what came before and loses nothing") {
  const testing::TemporaryFolder folder;
  const std::string path = folder / "metrics.jsonl";
  CHECK(truncate_jsonl(path, 0) == 0);  // no file
  std::ofstream(path)
      << "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"event\":\"x\",\"step\":2}\n{\"st";
  CHECK(truncate_jsonl(path, 2) == 2);
  CHECK(read_file(path) == "{\"step\":1}\n{\"step\":2}\n{\"event\":\"x\",\"step\":2}\n");
  CHECK(read_file(path + ".bak") == "{\"step\":3}\n{\"st\n");
  CHECK(truncate_jsonl(path, 2) == 0);
  CHECK(truncate_jsonl(path, 1) == 2);
  CHECK(read_file(path + ".bak") ==
        "{\"step\":3}\n{\"st\n{\"step\":2}\n{\"event\":\"x\",\"step\":2}\n");
}
