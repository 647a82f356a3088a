// Tasks that read files: CIFAR-10, pairs of papers, Pathfinder, on small files of the same layout, whole and spoilt.
#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>

#include "csrc/core/error.h"
#include "csrc/data/batch.h"
#include "csrc/data/task.h"
#include "csrc/data/task_source.h"
#include "tests/data/data_files.h"
#include "tests/support/catch.h"

namespace {

using namespace xlstm::data;
using namespace xlstm::testing;
using Tokens = std::vector<int64_t>;

TaskOptions named(const std::string& name, const std::string& path) {
  TaskOptions options;
  options.name = name, options.path = path;
  return options;
}

/// Byte of a pixel of an image, different in every colour and image.
int pixel(int image, int colour, int at) { return (37 * image + 101 * colour + 7 * at) % 256; }

std::string cifar_record(int image) {
  std::string bytes(1, static_cast<char>(image % 10));
  for (int colour = 0; colour < 3; ++colour)
    for (int at = 0; at < 1024; ++at) bytes += static_cast<char>(pixel(image, colour, at));
  return bytes;
}

/// Images 0 to 9 in five files, 10 to 12 in the test's.
std::string write_cifar(const std::filesystem::path& folder) {
  for (int batch = 1; batch <= 5; ++batch)
    write_bytes(folder / ("data_batch_" + std::to_string(batch) + ".bin"),
                cifar_record(2 * batch - 2) + cifar_record(2 * batch - 1));
  write_bytes(folder / "test_batch.bin", cifar_record(10) + cifar_record(11) + cifar_record(12));
  return folder.string();
}

std::string npy(const std::string& dtype, const std::string& shape, const std::string& bytes) {
  std::string header =
      "{'descr': '" + dtype + "', 'fortran_order': False, 'shape': " + shape + ", }";
  header.append((64 - (10 + header.size() + 1) % 64) % 64, ' ');
  header += '\n';
  return std::string("\x93NUMPY\x01\x00", 8) + little_endian(header.size(), 2) + header + bytes;
}

struct Member {
  std::string name, bytes;
  int method = 0;
};

/// A zip archive, without the checksums, which the reader does not look at.
std::string zip(const std::vector<Member>& members) {
  std::string archive, directory;
  for (const Member& m : members) {
    const std::string sizes = little_endian(m.bytes.size(), 4) + little_endian(m.bytes.size(), 4) +
                              little_endian(m.name.size(), 2);
    directory += little_endian(0x02014b50, 4) + little_endian(45, 2) + little_endian(45, 2) +
                 little_endian(0, 2) + little_endian(static_cast<uint64_t>(m.method), 2) +
                 little_endian(0, 8) + sizes + little_endian(0, 12) +
                 little_endian(archive.size(), 4) + m.name;
    archive += little_endian(0x04034b50, 4) + little_endian(45, 2) + little_endian(0, 2) +
               little_endian(static_cast<uint64_t>(m.method), 2) + little_endian(0, 8) + sizes +
               little_endian(5, 2) + m.name + "extra" + m.bytes;
  }
  const size_t start = archive.size(), count = members.size();
  return archive + directory + little_endian(0x06054b50, 4) + little_endian(0, 4) +
         little_endian(count, 2) + little_endian(count, 2) + little_endian(directory.size(), 4) +
         little_endian(start, 4) + little_endian(7, 2) + "comment";
}

/// `count` images of 2 x 3 pixels, pixel p of image i is 10 i + p, labels 0 1 1 0 1 1 ...
std::string small_images(int count) {
  std::string bytes;
  for (int i = 0; i < count; ++i)
    for (int p = 0; p < 6; ++p) bytes += static_cast<char>(10 * i + p);
  return npy("|u1", "(" + std::to_string(count) + ", 2, 3)", bytes);
}
std::string small_labels(int count, const std::string& dtype = "<i8", int bytes_each = 8) {
  std::string bytes;
  for (int i = 0; i < count; ++i) bytes += little_endian(i % 3 == 0 ? 0 : 1, bytes_each);
  return npy(dtype, "(" + std::to_string(count) + ",)", bytes);
}

std::string data_error(const TaskOptions& options, int64_t seq_len, int64_t features = 0) {
  return error_of([&] { make_task_data(options, seq_len, 1, true, 258, features); });
}

}  // namespace

TEST_CASE("cifar-10: grey pixels as tokens, the class at the last", "[arena]") {
  const TemporaryFolder folder;
  const auto data =
      make_task_data(named("image", write_cifar(folder / "cifar")), 1024, 1, false, 256);
  REQUIRE((data.train->samples_per_epoch() == 10 && data.held_out->num_windows() == 3));
  CHECK(data.held_out->chance() == 0.1);
  const Batch train = data.train->batch(0, 10), test = data.held_out->batch(0, 3);
  for (const auto& [batch, first, count] : {std::tuple(&train, 0, 10), std::tuple(&test, 10, 3)}) {
    CHECK(batch->num_targets == count);
    for (int row = 0; row < count; ++row)
      for (int at = 0; at < 1024; ++at) {
        const int image = first + row;
        const double grey =
            0.299 * pixel(image, 0, at) + 0.587 * pixel(image, 1, at) + 0.114 * pixel(image, 2, at);
        const auto i = static_cast<size_t>(1024 * row + at);
        REQUIRE(std::abs(static_cast<double>(batch->input[i]) - grey) <= 0.5 + 1e-9);
        REQUIRE(batch->target[i] == (at == 1023 ? image % 10 : kIgnored));
      }
  }
}

TEST_CASE("cifar-10: colours as vectors, less their means over the data set", "[arena]") {
  const TemporaryFolder folder;
  const auto data =
      make_task_data(named("rgb_image", write_cifar(folder / "cifar")), 1024, 1, false, 10, 3);
  CHECK(data.held_out->chance() == 0.1);
  const Batch batch = data.train->batch(3, 2);
  REQUIRE((batch.features.size() == 2 * 1024 * 3 && batch.values.empty()));
  CHECK(batch.num_targets == 2);
  const double mean[] = {0.4914, 0.4822, 0.4465}, deviation[] = {0.2470, 0.2435, 0.2616};
  for (int row = 0; row < 2; ++row)
    for (int at = 0; at < 1024; ++at)
      for (int c = 0; c < 3; ++c) {
        const auto i = static_cast<size_t>(1024 * row + at);
        const double back = batch.features[3 * i + static_cast<size_t>(c)] * deviation[c] + mean[c];
        REQUIRE(255 * back == Approx(pixel(3 + row, c, at)).margin(1e-4));
        REQUIRE(batch.target[i] == (at == 1023 ? 3 + row : kIgnored));
      }
}

TEST_CASE("recorded tasks: an epoch has every sample once, and a part where that is asked for",
          "[arena]") {
  const TemporaryFolder folder;
  TaskOptions options = named("image", write_cifar(folder / "cifar"));
  const auto classes = [&](const TaskData& data, int64_t first, int64_t count) {
    Tokens found;
    const Batch batch = data.train->batch(first, count);
    for (size_t i = 1023; i < batch.target.size(); i += 1024) found.push_back(batch.target[i]);
    return found;
  };
  const auto data = make_task_data(options, 1024, 1, true, 256);
  Tokens one = classes(data, 0, 10), two = classes(data, 10, 10);
  CHECK(one != two);
  CHECK(one != classes(make_task_data(options, 1024, 2, true, 256), 0, 10));
  std::sort(one.begin(), one.end()), std::sort(two.begin(), two.end());
  CHECK((one == two && one == Tokens{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}));
  options.train_samples = 4, options.eval_samples = 2;
  const auto part = make_task_data(options, 1024, 1, true, 256);
  CHECK((part.train->samples_per_epoch() == 4 && part.held_out->num_windows() == 2));
  Tokens four = classes(part, 4, 4);
  std::sort(four.begin(), four.end());
  CHECK(four == Tokens{0, 1, 2, 3});
  options.train_samples = 11;
  CHECK(contains(
      error_of([&] { make_task_data(options, 1024, 1, true, 256); }, xlstm::ExitCode::kConfig),
      "data.task.train_samples is 11, expected at most 10"));
  options.train_samples = 0;
  CHECK(contains(
      error_of([&] { make_task_data(options, 1000, 1, true, 256); }, xlstm::ExitCode::kConfig),
      "data.seq_len is 1000, expected at least 1024"));
  // Other files are other data.
  write_bytes(folder / "cifar/data_batch_3.bin", cifar_record(7) + cifar_record(5));
  CHECK(make_task_data(options, 1024, 1, true, 256).train->fingerprint() !=
        data.train->fingerprint());
}

TEST_CASE("cifar-10: the last tenth of what trains is held out to choose by", "[arena]") {
  const TemporaryFolder folder;
  TaskOptions options = named("image", write_cifar(folder / "cifar"));
  const std::string whole = make_task_data(options, 1024, 1, false, 256).train->fingerprint();
  options.held_out = "validation";
  const auto data = make_task_data(options, 1024, 1, false, 256);
  REQUIRE((data.train->samples_per_epoch() == 9 && data.held_out->num_windows() == 1));
  const Batch train = data.train->batch(0, 9), held_out = data.held_out->batch(0, 1);
  for (size_t image = 0; image < 9; ++image)
    CHECK(train.target[1024 * image + 1023] == static_cast<int64_t>(image));
  CHECK(held_out.target[1023] == 9);
  CHECK(data.held_out->name() == "data.task image, validation");
  CHECK(data.train->fingerprint() != whole);
}

TEST_CASE("recorded tasks: a change of a sixteenth of a large file is seen wherever it is",
          "[arena]") {
  const TemporaryFolder folder;
  const TaskOptions options = named("image", write_cifar(folder / "cifar"));
  std::string records;
  for (int i = 0; i < 3000; ++i) records += cifar_record(i % 10);  // 9 MB, not all of which is read
  const auto fingerprint = [&](const std::string& bytes) {
    write_bytes(folder / "cifar/data_batch_4.bin", bytes);
    return make_task_data(options, 1024, 1, true, 256).train->fingerprint();
  };
  const std::string before = fingerprint(records);
  CHECK(fingerprint(records) == before);
  for (size_t part = 0; part < 16; ++part) {
    std::string other = records;
    for (size_t i = 3073 * 188 * part; i < std::min(other.size(), 3073 * 188 * (part + 1)); ++i)
      if (i % 3073 != 0) other[i] = static_cast<char>(other[i] + 1);  // the classes stay
    CHECK(fingerprint(other) != before);
  }
}

TEST_CASE("cifar-10: files that are missing or wrong are named", "[arena]") {
  const TemporaryFolder folder;
  const std::string path = write_cifar(folder / "cifar");
  const auto error = [&] { return data_error(named("image", path), 1024); };
  write_bytes(folder / "cifar/data_batch_2.bin", cifar_record(1) + "x");
  CHECK(contains(error(), "data_batch_2.bin: 3074 bytes are not a multiple of 3073"));
  write_bytes(folder / "cifar/data_batch_2.bin",
              cifar_record(1) + "\x0a" + cifar_record(1).substr(1));
  CHECK(contains(error(), "data_batch_2.bin: image 1 has class 10, expected 0 to 9"));
  write_bytes(folder / "cifar/data_batch_2.bin", "");
  CHECK(contains(error(), "data_batch_2.bin: the file is empty"));
  std::filesystem::remove(folder / "cifar/data_batch_2.bin");
  CHECK(contains(error(), "data_batch_2.bin: no such file; data.task.path must be the folder"));
  CHECK(contains(error(), "cifar-10-binary.tar.gz"));
}

TEST_CASE("retrieval: two texts as bytes with a separator, the label at the last", "[arena]") {
  const TemporaryFolder folder;
  write_bytes(folder / "new_aan_pairs.train.tsv",
              "1.0\tA\tB\tfirst text\tsecond\n0\tC\tD\t\xc3\xa9\"x\t\n1\tE\tF\t\tz\n");
  write_bytes(folder / "new_aan_pairs.test.tsv", "0.0\tA\tB\tab\tcd");
  const TaskOptions options = named("retrieval", (folder / "").string());
  const auto data = make_task_data(options, 13, 1, false, 258);
  REQUIRE((data.train->samples_per_epoch() == 3 && data.held_out->num_windows() == 1));
  CHECK(data.held_out->chance() == 0.5);
  // Six bytes of each.
  const auto expected = [](const std::string& first, const std::string& second, int64_t label) {
    std::pair<Tokens, Tokens> row;
    for (const char c : first) row.first.push_back(1 + static_cast<unsigned char>(c));
    row.first.push_back(257);
    for (const char c : second) row.first.push_back(1 + static_cast<unsigned char>(c));
    row.second.assign(row.first.size(), kIgnored);
    row.second.back() = label;
    row.first.resize(13, 0), row.second.resize(13, kIgnored);
    return row;
  };
  const auto row = [](const Batch& batch) { return std::pair(batch.input, batch.target); };
  CHECK(row(data.train->batch(0, 1)) == expected("first ", "second", 2));
  CHECK(row(data.train->batch(1, 1)) == expected("\xc3\xa9\"x", "", 1));
  CHECK(row(data.train->batch(2, 1)) == expected("", "z", 2));
  CHECK(row(data.held_out->batch(0, 1)) == expected("ab", "cd", 1));
  TaskOptions validation = options;
  validation.held_out = "validation";
  CHECK(contains(data_error(validation, 13), "new_aan_pairs.eval.tsv: no such file"));
  write_bytes(folder / "new_aan_pairs.eval.tsv", "1\tA\tB\tef\tgh");
  const auto other = make_task_data(validation, 13, 1, false, 258);
  CHECK(row(other.held_out->batch(0, 1)) == expected("ef", "gh", 2));
  CHECK(row(other.train->batch(0, 1)) == expected("first ", "second", 2));

  const auto spoilt = [&](const std::string& line) {
    write_bytes(folder / "new_aan_pairs.train.tsv", "1\tA\tB\tc\td\n" + line);
    return data_error(options, 13);
  };
  CHECK(contains(spoilt("1\tA\tB\tc\n"), "train.tsv: line 2 has 4 columns, expected 5"));
  CHECK(contains(spoilt("1\tA\tB\tc\td\te\n"), "train.tsv: line 2 has 6 columns, expected 5"));
  CHECK(contains(spoilt("yes\tA\tB\tc\td\n"), "train.tsv: line 2 has the label \"yes\", expected"));
  CHECK(contains(spoilt("\n"), "train.tsv: line 2 has 1 columns"));
  std::filesystem::remove(folder / "new_aan_pairs.test.tsv");
  write_bytes(folder / "new_aan_pairs.train.tsv", "1\tA\tB\tc\td\n");
  CHECK(contains(data_error(options, 13), "new_aan_pairs.test.tsv: no such file; data.task.path"));
}

TEST_CASE("pathfinder: images of .npz and of .npy files", "[arena]") {
  const TemporaryFolder folder;
  write_bytes(folder / "train.npz", zip({{"labels.npy", small_labels(5)},
                                         {"other.npy", "x", 8},
                                         {"images.npy", small_images(5)}}));
  write_bytes(folder / "test_images.npy", small_images(4));
  write_bytes(folder / "test_labels.npy", small_labels(4, "|u1", 1));
  const auto data = make_task_data(named("pathfinder", (folder / "").string()), 6, 1, false, 256);
  REQUIRE((data.train->samples_per_epoch() == 5 && data.held_out->num_windows() == 4));
  CHECK(data.held_out->chance() == 0.5);
  for (const Batch& batch : {data.train->batch(0, 4), data.held_out->batch(0, 4)})
    for (int image = 0; image < 4; ++image)
      for (int p = 0; p < 6; ++p) {
        const auto i = static_cast<size_t>(6 * image + p);
        CHECK(batch.input[i] == 10 * image + p);
        CHECK(batch.target[i] == (p < 5 ? kIgnored : image % 3 == 0 ? 0 : 1));
      }
}

TEST_CASE("pathfinder: the images to choose by are apart from the test's", "[arena]") {
  const TemporaryFolder folder;
  TaskOptions options = named("pathfinder", (folder / "").string());
  options.held_out = "validation";
  write_bytes(folder / "train.npz",
              zip({{"images.npy", small_images(5)}, {"labels.npy", small_labels(5)}}));
  CHECK(contains(data_error(options, 6), "validation.npz: no such file"));
  write_bytes(folder / "validation_images.npy", small_images(3));
  write_bytes(folder / "validation_labels.npy", small_labels(3));
  const auto data = make_task_data(options, 6, 1, false, 256);
  CHECK((data.train->samples_per_epoch() == 5 && data.held_out->num_windows() == 3));
}

TEST_CASE("pathfinder: files that are missing or wrong are named", "[arena]") {
  const TemporaryFolder folder;
  const TaskOptions options = named("pathfinder", (folder / "").string());
  CHECK(
      contains(data_error(options, 6), "train.npz: no such file; data.task.path must be a folder"));
  const std::string images = small_images(4), labels = small_labels(4);
  const auto error = [&](const std::string& train_images, const std::string& train_labels) {
    write_bytes(folder / "train_images.npy", train_images);
    write_bytes(folder / "train_labels.npy", train_labels);
    return data_error(options, 6);
  };
  CHECK(contains(error(images, labels), "test.npz: no such file"));
  write_bytes(folder / "test_images.npy", images);
  write_bytes(folder / "test_labels.npy", labels);
  CHECK(contains(error("x", labels), "train_images.npy: not a .npy array"));
  CHECK(contains(error(images.substr(0, 40), labels),
                 "train_images.npy: the array ends in its header"));
  CHECK(contains(error(images.substr(0, images.size() - 1), labels),
                 "train_images.npy: the file ends before the array does"));
  CHECK(contains(error(npy("<f8", "(4,)", std::string(32, 'x')), labels),
                 "dtype <f8, expected uint8"));
  CHECK(contains(error(npy("<i4", "(4,)", std::string(16, 'x')), labels),
                 "images of dtype <i4 and 1 dimensions, expected |u1"));
  CHECK(
      contains(error(npy("|u1", "(0, 2, 3)", ""), labels), "train_images.npy: the array is empty"));
  CHECK(contains(error(images, npy("|u1", "(4, 1)", std::string(4, '\0'))),
                 "train_labels.npy: labels of 2 dimensions, expected 1"));
  CHECK(contains(error(images, small_labels(5)), "train_labels.npy: 5 labels for 4 images"));
  CHECK(contains(error(images, npy("|i1", "(4,)", std::string("\0\xff\0\0", 4))),
                 "train_labels.npy: image 1 has label -1, expected 0 or 1"));
  CHECK(contains(error(npy("|u1", "(4, 1, 3)", std::string(12, 'x')), labels),
                 "the images that train have 3 pixels, those of the test 6"));
  std::string columns = images;
  columns.replace(columns.find("False"), 5, "True").insert(columns.find('\n'), " ");
  CHECK(contains(error(columns, labels), "train_images.npy: stored in columns (Fortran order)"));
  const std::string huge = npy("|u1", "(4, 2, 3)" + std::string(2000, ' '), std::string(24, 'x'));
  CHECK(contains(error(huge, labels), "train_images.npy: its header is not one of a plain array"));
  columns.replace(columns.find("'shape'"), 7, "'chape'");
  CHECK(contains(error(columns, labels), "train_images.npy: its header is not one of a plain"));

  const auto archive_error = [&](const std::string& bytes) {
    write_bytes(folder / "train.npz", bytes);
    return data_error(options, 6);
  };
  const std::string good = zip({{"images.npy", images}, {"labels.npy", labels}});
  CHECK(contains(archive_error("PK"), "train.npz: not an .npz archive"));
  CHECK(contains(archive_error(zip({{"images.npy", images}})), "no array labels in the archive"));
  CHECK(contains(archive_error(zip({{"images.npy", images, 8}, {"labels.npy", labels}})),
                 "images.npy is compressed; write the archive with numpy.savez"));
  CHECK(contains(archive_error(good.substr(100)), "train.npz: the archive is damaged"));
  // Beyond 2 GiB numpy writes this number in place of a size or an offset, and the true one elsewhere.
  const auto in_zip64 = [&](size_t at) {
    std::string bytes = good;
    return archive_error(bytes.replace(at, 4, "\xff\xff\xff\xff"));
  };
  const size_t directory = good.find(little_endian(0x02014b50, 4));
  for (const size_t field : {size_t{20}, size_t{42}})
    CHECK(contains(in_zip64(directory + field),
                   "images.npy, or what stands before it, is larger than 2 GiB; write .npy files"));
  CHECK(contains(in_zip64(good.rfind(little_endian(0x06054b50, 4)) + 16),
                 "train.npz: the archive is larger than 2 GiB; write .npy files"));
  write_bytes(folder / "train.npz", good);
  CHECK_NOTHROW(make_task_data(options, 6, 1, true, 256));
}
