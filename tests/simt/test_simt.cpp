// Every correct kernel runs without a report under several schedules, every planted bug is reported.
#include <string>

#include "tests/simt/check_cases.h"

using simt_test::Case;
using simt_test::List;
using simt_test::Planted;

namespace {

constexpr std::uint64_t kSeeds = 4;

void all_correct(const List<Case>& list) { simt_test::all_correct(list, 0, kSeeds); }

void all_reported(const List<Planted>& list, std::uint64_t seeds = kSeeds) {
  const simt::Build build = simt::build_kind();
  for (std::size_t i = 0; i < list.count; ++i) {
    const Planted& bug = list.first[i];
    const int at_start = simt::sanitizer_reports();
    for (std::uint64_t seed = 0; seed < seeds; ++seed) {
      INFO(bug.name << ", seed " << seed);
      const int before = simt::sanitizer_reports();
      std::string message;
      try {
        bug.run(seed);
      } catch (const std::runtime_error& error) {
        message = error.what();
      }
      INFO("message: " << message);
      if (bug.error != nullptr) CHECK(message.find(bug.error) != std::string::npos);
      if (build == simt::Build::kThread && bug.thread) CHECK(simt::sanitizer_reports() > before);
    }
    // The undefined-behaviour sanitizer reports a line once per process.
    INFO(bug.name);
    if (build == simt::Build::kAddress && bug.address) CHECK(simt::sanitizer_reports() > at_start);
  }
}

}  // namespace

TEST_CASE("barriers, shuffles, copies, clusters") { all_correct(simt_test::sm80_cases()); }
TEST_CASE("fragment layouts") { all_correct(simt_test::layout_cases()); }
TEST_CASE("mbarriers and clusters") { all_correct(simt_test::sm90_cases()); }
TEST_CASE("tensor copies") { all_correct(simt_test::tensor_cases()); }
TEST_CASE("wgmma") { all_correct(simt_test::wgmma_cases()); }
TEST_CASE("planted bugs of synchronisation are reported") { all_reported(simt_test::sm80_bugs()); }
TEST_CASE("planted bugs of access are reported") { all_reported(simt_test::access_bugs()); }
TEST_CASE("planted bugs of mbarriers and clusters are reported") {
  all_reported(simt_test::sm90_bugs());
}
TEST_CASE("planted bugs of tensor copies are reported") { all_reported(simt_test::tensor_bugs()); }
TEST_CASE("planted bugs of wgmma are reported") { all_reported(simt_test::wgmma_bugs()); }
TEST_CASE("planted bugs of the sLSTM's exchanges are reported") {
  // Whole kernels: the thread sanitizer sees a missing order in any schedule and takes a second for each.
  all_reported(simt_test::slstm_bugs(), simt::build_kind() == simt::Build::kThread ? 1 : kSeeds);
}
