#include "csrc/core/error.h"
#include "tests/support/catch.h"
#include "train/device.h"

using namespace xlstm;

TEST_CASE("devices are auto, cpu and cuda; the GPU is chosen outside") {
  CHECK(train::choose_device("cpu", "--device").is_cpu());
  for (const std::string name : {"gpu", "cuda:1", "CPU", ""}) {
    std::string message;
    try {
      train::choose_device(name, "--device");
    } catch (const Error& error) {
      CHECK(error.code == ExitCode::kConfig);
      message = error.what();
    }
    CHECK(message == "--device: expected auto, cpu or cuda, got " + name +
                         "; CUDA_VISIBLE_DEVICES picks the GPU");
  }
}
