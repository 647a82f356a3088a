// CIFAR-10 in its binary version: five files that train and one that is held out, of records of 3073 bytes: the class, then
// the 32 x 32 pixels, row by row, of red, of green and of blue. For validation the last tenth of those that train is held out,
// as in the Arena.
//   image      the Arena's: grey pixels as tokens 0 to 255
//   rgb_image  pixels as vectors of three colours, as in LRU and S5 (arXiv 2303.06349, 2208.04933), less their means over
//              the training set and divided by their deviations there, in the four digits usual with torchvision
// Asked at the last pixel is the class, 0 to 9.
#include <array>
#include <filesystem>

#include "csrc/core/error.h"
#include "csrc/data/batch.h"
#include "csrc/data/recorded_task.h"

namespace xlstm::data {
namespace {

constexpr int64_t kPixels = 32 * 32, kClasses = 10, kRecordBytes = 1 + 3 * kPixels;
constexpr const char* kHowToGet =
    "data.task.path must be the folder cifar-10-batches-bin with data_batch_1.bin to "
    "data_batch_5.bin and test_batch.bin, of the binary version of CIFAR-10: "
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz";
constexpr std::array<double, 3> kMean = {0.4914, 0.4822, 0.4465},
                                kDeviation = {0.2470, 0.2435, 0.2616};

/// Luma of ITU-R 601 in thousandths, rounded: whole numbers, the same on every machine.
int64_t grey(int64_t red, int64_t green, int64_t blue) {
  return (299 * red + 587 * green + 114 * blue + 500) / 1000;
}

class Cifar10 final : public RecordedTask {
 public:
  explicit Cifar10(const TaskOptions& options)
      : RecordedTask(kHowToGet), colour_(options.name == "rgb_image") {
    const std::filesystem::path folder = options.path;
    for (int batch = 1; batch <= 5; ++batch)
      add(train_, (folder / ("data_batch_" + std::to_string(batch) + ".bin")).string());
    if (held_out_part(options) == Part::kValidation) {
      const auto first = train_.end() - std::ssize(train_) / 10;
      held_out_.assign(first, train_.end());
      train_.erase(first, train_.end());
    } else {
      add(held_out_, (folder / "test_batch.bin").string());
    }
  }
  std::optional<int64_t> num_recorded(Part part) const override {
    return std::ssize(part == Part::kTrain ? train_ : held_out_);
  }
  int64_t vocab_size() const override { return colour_ ? kClasses : 256; }
  int64_t features() const override { return colour_ ? 3 : 0; }
  double chance() const override { return 0.1; }
  int64_t shortest() const override { return kPixels; }

 protected:
  TaskSample record(Part part, int64_t index, int64_t /*length*/) const override {
    const unsigned char* const bytes =
        (part == Part::kTrain ? train_ : held_out_)[static_cast<size_t>(index)];
    TaskSample s;
    s.target.assign(kPixels, kIgnored);
    s.target.back() = bytes[0];
    for (int64_t pixel = 0; pixel < kPixels; ++pixel) {
      const unsigned char* const red = bytes + 1 + pixel;
      if (!colour_) {
        s.input.push_back(grey(red[0], red[kPixels], red[2 * kPixels]));
        continue;
      }
      for (size_t c = 0; c < 3; ++c)
        s.features.push_back(
            static_cast<float>((red[c * kPixels] / 255.0 - kMean[c]) / kDeviation[c]));
    }
    return s;
  }

 private:
  void add(std::vector<const unsigned char*>& records, const std::string& path) {
    MappedFile& file = files_.emplace_back(open(path));
    const auto size = static_cast<int64_t>(file.size());
    if (size % kRecordBytes != 0)
      refuse(path, std::to_string(size) + " bytes are not a multiple of " +
                       std::to_string(kRecordBytes) + ", an image with its class");
    for (int64_t at = 0; at < size; at += kRecordBytes) {
      if (file.data()[at] >= kClasses)
        refuse(path, "image " + std::to_string(at / kRecordBytes) + " has class " +
                         std::to_string(file.data()[at]) + ", expected 0 to 9");
      records.push_back(file.data() + at);
    }
  }

  bool colour_;
  std::vector<MappedFile> files_;
  std::vector<const unsigned char*> train_, held_out_;  ///< first byte of each record
};

}  // namespace

std::unique_ptr<Task> make_cifar10(const TaskOptions& options) {
  return std::make_unique<Cifar10>(options);
}

}  // namespace xlstm::data
