// Pathfinder of the Long Range Arena: grey images of dashed curves with two marked ends, and whether one curve joins them. The
// pixels are read row by row as tokens 0 to 255; asked at the last one is the label, 0 or 1.
#include <filesystem>
#include <stdexcept>

#include "csrc/core/error.h"
#include "csrc/data/batch.h"
#include "csrc/data/numpy_file.h"
#include "csrc/data/recorded_task.h"

namespace xlstm::data {
namespace {

namespace fs = std::filesystem;

constexpr const char* kHowToGet =
    "data.task.path must be a folder with train.npz and test.npz (numpy.savez of uint8 images of "
    "shape (N, height, width) and labels, 0 or 1, of shape (N)) or with train_images.npy, "
    "train_labels.npy, test_images.npy and test_labels.npy (data.task.held_out validation: of that "
    "name instead of test); scripts/convert_pathfinder.py writes them from the PNG files of "
    "pathfinder32 in the Long Range Arena's lra_release.gz "
    "(https://github.com/google-research/long-range-arena)";

struct Images {
  NumpyArray pixels, labels;
  int64_t count() const { return labels.size(); }
  int64_t pixels_each() const { return pixels.shape[1] * pixels.shape[2]; }
};

class Pathfinder final : public RecordedTask {
 public:
  explicit Pathfinder(const TaskOptions& options)
      : RecordedTask(kHowToGet),
        train_(read(options.path, "train")),
        held_out_(read(options.path, options.held_out)) {
    if (train_.pixels_each() != held_out_.pixels_each())
      refuse(options.path, "the images that train have " + std::to_string(train_.pixels_each()) +
                               " pixels, those of the " + options.held_out + " " +
                               std::to_string(held_out_.pixels_each()));
  }
  std::optional<int64_t> num_recorded(Part part) const override {
    return (part == Part::kTrain ? train_ : held_out_).count();
  }
  int64_t vocab_size() const override { return 256; }
  double chance() const override { return 0.5; }
  int64_t shortest() const override { return train_.pixels_each(); }

 protected:
  TaskSample record(Part part, int64_t index, int64_t /*length*/) const override {
    const Images& images = part == Part::kTrain ? train_ : held_out_;
    const int64_t count = images.pixels_each();
    const unsigned char* const first = images.pixels.data + index * count;
    TaskSample s{{first, first + count},
                 std::vector<int64_t>(static_cast<size_t>(count), kIgnored)};
    s.target.back() = images.labels[index];
    return s;
  }

 private:
  Images read(const std::string& folder, const std::string& part) {
    const std::string archive = (fs::path(folder) / (part + ".npz")).string();
    Images images;
    if (fs::exists(archive)) {
      const MappedFile& file = files_.emplace_back(open(archive));
      const Bytes bytes{file.data(), file.size()};
      images.pixels = array(archive, [&] { return read_npy(npz_member(bytes, "images")); });
      images.labels = array(archive, [&] { return read_npy(npz_member(bytes, "labels")); });
      check(images, archive, archive);
      return images;
    }
    const std::string pixels = (fs::path(folder) / (part + "_images.npy")).string(),
                      labels = (fs::path(folder) / (part + "_labels.npy")).string();
    if (!fs::exists(pixels)) refuse(archive, "no such file");
    images.pixels = array(pixels, [&] { return whole(pixels); });
    images.labels = array(labels, [&] { return whole(labels); });
    check(images, pixels, labels);
    return images;
  }

  NumpyArray whole(const std::string& path) {
    const MappedFile& file = files_.emplace_back(open(path));
    return read_npy({file.data(), file.size()});
  }

  /// Adds the file's name, and how to get a right one, to what is wrong with its array.
  template <typename Read>
  NumpyArray array(const std::string& path, Read read) const {
    try {
      return read();
    } catch (const Error&) {
      throw;
    } catch (const std::runtime_error& error) {
      refuse(path, error.what());
    }
  }

  void check(const Images& images, const std::string& pixels, const std::string& labels) const {
    if (images.pixels.dtype != "|u1" || images.pixels.shape.size() != 3)
      refuse(pixels, "images of dtype " + images.pixels.dtype + " and " +
                         std::to_string(images.pixels.shape.size()) +
                         " dimensions, expected |u1 (uint8) and 3");
    if (images.labels.shape.size() != 1)
      refuse(labels,
             "labels of " + std::to_string(images.labels.shape.size()) + " dimensions, expected 1");
    if (images.count() != images.pixels.shape[0])
      refuse(labels, std::to_string(images.count()) + " labels for " +
                         std::to_string(images.pixels.shape[0]) + " images");
    for (int64_t i = 0; i < images.count(); ++i)
      if (const int64_t label = images.labels[i]; label != 0 && label != 1)
        refuse(labels, "image " + std::to_string(i) + " has label " + std::to_string(label) +
                           ", expected 0 or 1");
  }

  std::vector<MappedFile> files_;  ///< before what points into them
  Images train_, held_out_;
};

}  // namespace

std::unique_ptr<Task> make_pathfinder(const TaskOptions& options) {
  return std::make_unique<Pathfinder>(options);
}

}  // namespace xlstm::data
