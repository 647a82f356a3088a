// Nearest Neighbor Search of arXiv 2405.04517 (Figure 2): a key, then vectors with values; asked at every vector is the
// value of the nearest one so far. Vectors are unit vectors of the plane, values lie in [0, 1).
#include <cmath>
#include <limits>

#include "csrc/data/batch.h"
#include "csrc/data/task.h"

namespace xlstm::data {
namespace {

struct Direction {
  double x, y;
};

double unit(Random& random) { return static_cast<double>(random.next() >> 40) * 0x1p-24; }

/// A point of the disc, pushed out to the circle: every operation is exact or correctly rounded, on any platform.
Direction direction(Random& random) {
  for (;;) {
    const double x = 2 * unit(random) - 1, y = 2 * unit(random) - 1, square = x * x + y * y;
    if (square > 1 || square < 1e-4) continue;
    const double norm = std::sqrt(square);
    return {x / norm, y / norm};
  }
}

class NearestNeighbor final : public Task {
 public:
  int64_t vocab_size() const override { return 1; }
  int64_t features() const override { return 3; }
  bool predicts_numbers() const override { return true; }
  double chance() const override { return 0; }
  int64_t shortest() const override { return 2; }
  bool varies() const override { return true; }

  TaskSample sample(Random& random, int64_t length) const override {
    TaskSample s;
    const Direction key = direction(random);
    s.features = {static_cast<float>(key.x), static_cast<float>(key.y), 0.0F};
    s.values = {std::numeric_limits<float>::quiet_NaN()};
    double best = -2;  // cosine of the nearest so far
    float value = 0;
    for (int64_t t = 1; t < length; ++t) {
      const Direction at = direction(random);
      const auto own = static_cast<float>(unit(random));
      s.features.insert(s.features.end(),
                        {static_cast<float>(at.x), static_cast<float>(at.y), own});
      const double cosine = key.x * at.x + key.y * at.y;
      if (cosine > best) best = cosine, value = own;
      s.values.push_back(value);
    }
    return s;
  }
};

}  // namespace

std::unique_ptr<Task> make_nearest_neighbor() { return std::make_unique<NearestNeighbor>(); }

}  // namespace xlstm::data
