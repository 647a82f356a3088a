// The sLSTM kernels against the recurrence and its gradients: cells, types, sizes, exchanges, documents.
#include "tests/simt/slstm_call.h"

namespace simt_test {
namespace {

constexpr DeviceLimits kAmpere{80, 16, 163 * 1024}, kHopper{90, 32, 227 * 1024, true};
constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
constexpr SlstmCell kCells[] = {SlstmCell::kSlstm, SlstmCell::kSlstmExpf, SlstmCell::kLstm};
constexpr SlstmExchange kExchanges[] = {SlstmExchange::kBlock, SlstmExchange::kCluster, SlstmExchange::kGrid};

double forget_of(SlstmCell cell) { return cell == SlstmCell::kSlstmExpf ? -1 : 1; }

void cells_and_types(uint64_t seed) {
  for (const Dtype dtype : kDtypes)
    for (const SlstmCell cell : kCells)
      run({.cell = cell, .batch = 3, .dtype = dtype, .states = true, .forget = forget_of(cell)}, seed);
}

void exchanges(uint64_t seed) {
  for (const SlstmExchange exchange : kExchanges)
    for (const Dtype dtype : kDtypes) {
      const int64_t dh = exchange == SlstmExchange::kBlock ? 64 : 96;
      run({.batch = 9, .time = 5, .dh = dh, .dtype = dtype, .exchange = exchange, .device = kHopper, .states = true},
          seed);
    }
}

}  // namespace

List<Case> slstm_cases() {
  static const Case cases[] = {
      {"slstm: cells and types in one block", cells_and_types},
      {"slstm: exchanges", exchanges},
  };
  return {cases, sizeof(cases) / sizeof(cases[0])};
}

}  // namespace simt_test
