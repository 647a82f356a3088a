#include <cmath>
#include <numbers>

#include "tests/support/catch.h"
#include "train/schedule.h"

using namespace xlstm;
using train::learning_rate;

namespace {

config::OptimConfig options(const std::string& schedule) {
  config::OptimConfig result;
  result.learning_rate = 1e-2;
  result.min_lr = 1e-3;
  result.warmup_steps = 10;
  result.schedule = schedule;
  return result;
}

}  // namespace

TEST_CASE("warm-up rises linearly and reaches the full rate at its last update") {
  for (const char* schedule : {"cosine", "linear", "constant", "wsd"}) {
    const config::OptimConfig given = options(schedule);
    for (int64_t step = 1; step <= 10; ++step) {
      CHECK(learning_rate(given, step, 110) == Approx(1e-3 * static_cast<double>(step)));
    }
  }
}

TEST_CASE("schedules after the warm-up") {
  CHECK(learning_rate(options("cosine"), 60, 110) == Approx(5.5e-3));  // half way
  CHECK(learning_rate(options("cosine"), 35, 110) ==
        Approx(1e-3 + 9e-3 * 0.5 * (1 + std::sqrt(0.5))));
  CHECK(learning_rate(options("linear"), 60, 110) == Approx(5.5e-3));
  CHECK(learning_rate(options("linear"), 11, 110) == Approx(1e-2 - 9e-3 / 100));
  CHECK(learning_rate(options("constant"), 110, 110) == 1e-2);
  for (const char* schedule : {"cosine", "linear", "wsd"}) {
    CHECK(learning_rate(options(schedule), 110, 110) == Approx(1e-3));
  }
}

TEST_CASE("cosine with restarts: equal descents to the last rate, each from the full one") {
  config::OptimConfig given = options("cosine");
  given.restarts = 3;  // parts of 100 updates after 10 of warm-up
  CHECK(learning_rate(given, 10, 410) == 1e-2);
  for (const int64_t start : {10, 110, 210, 310}) {
    CAPTURE(start);
    CHECK(learning_rate(given, start + 1, 410) ==
          Approx(1e-3 + 9e-3 * 0.5 * (1 + std::cos(std::numbers::pi / 100))));
    CHECK(learning_rate(given, start + 50, 410) == Approx(5.5e-3));
    CHECK(learning_rate(given, start + 75, 410) ==
          Approx(1e-3 + 9e-3 * 0.5 * (1 - std::sqrt(0.5))));
    CHECK(learning_rate(given, start + 100, 410) == Approx(1e-3).epsilon(1e-12));
  }
  // Parts that are no whole number of updates: ends at 2.5, 5, 7.5 and 10.
  given.warmup_steps = 0;
  const double falls[] = {0.4, 0.8, 0.2, 0.6, 1.0, 0.4, 0.8, 0.2, 0.6, 1.0};
  for (int64_t step = 1; step <= 10; ++step) {
    CAPTURE(step);
    CHECK(learning_rate(given, step, 10) ==
          Approx(1e-3 + 9e-3 * 0.5 * (1 + std::cos(std::numbers::pi * falls[step - 1]))));
  }
  given.restarts = 0;
  CHECK(learning_rate(given, 4, 10) == learning_rate(options("cosine"), 14, 20));
}

TEST_CASE("wsd stays at the full rate until its decay") {
  config::OptimConfig given = options("wsd");
  CHECK(learning_rate(given, 99, 110) == 1e-2);  // a tenth of 110 updates decays: 100 to 110
  CHECK(learning_rate(given, 100, 110) == Approx(1e-2 - 9e-3 / 11));
  given.decay_steps = 20;
  CHECK(learning_rate(given, 90, 110) == 1e-2);
  CHECK(learning_rate(given, 100, 110) == Approx(5.5e-3));
  given.decay_steps = 1000;  // longer than the run: the decay starts where the warm-up ends
  CHECK(learning_rate(given, 10, 110) == 1e-2);
  CHECK(learning_rate(given, 60, 110) == Approx(5.5e-3));
}

TEST_CASE("runs that are all warm-up, and runs without one") {
  config::OptimConfig given = options("cosine");
  CHECK(learning_rate(given, 5, 5) == Approx(5e-3));
  given.warmup_steps = 0;
  CHECK(learning_rate(given, 1, 1) == Approx(1e-3));
  CHECK(learning_rate(given, 1, 2) == Approx(5.5e-3));
}
