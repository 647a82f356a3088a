// Retrieval of the Long Range Arena: pairs of papers of the ACL Anthology Network (AAN), and whether one cites the other. A line of
// its files is label, two names and two texts, with tabs between them. The model reads both texts as bytes, each cut to the
// same length, with a separator between them, and is asked for the label at the last byte.
#include <algorithm>
#include <array>
#include <filesystem>
#include <string_view>

#include "csrc/core/error.h"
#include "csrc/data/batch.h"
#include "csrc/data/recorded_task.h"

namespace xlstm::data {
namespace {

constexpr const char* kHowToGet =
    "data.task.path must be the folder tsv_data of the Long Range Arena's lra_release.gz "
    "(https://github.com/google-research/long-range-arena) with new_aan_pairs.train.tsv and "
    "new_aan_pairs.test.tsv (data.task.held_out validation: new_aan_pairs.eval.tsv), of lines: "
    "label, two names, two texts, with tabs between them";
/// Tokens: 0 is padding, byte b is 1 + b, then the separator; the labels are 1 and 2.
constexpr int64_t kSeparator = 257, kVocab = 258;
constexpr size_t kColumns = 5;

struct Pair {
  bool cites = false;
  std::string_view first, second;
};

class PaperPairs final : public RecordedTask {
 public:
  explicit PaperPairs(const TaskOptions& options) : RecordedTask(kHowToGet) {
    const std::filesystem::path folder = options.path;
    add(train_, (folder / "new_aan_pairs.train.tsv").string());
    const bool validation = held_out_part(options) == Part::kValidation;
    const char* const held_out = validation ? "new_aan_pairs.eval.tsv" : "new_aan_pairs.test.tsv";
    add(held_out_, (folder / held_out).string());
  }
  std::optional<int64_t> num_recorded(Part part) const override {
    return std::ssize(part == Part::kTrain ? train_ : held_out_);
  }
  int64_t vocab_size() const override { return kVocab; }
  double chance() const override { return 0.5; }
  int64_t shortest() const override { return 3; }

 protected:
  TaskSample record(Part part, int64_t index, int64_t length) const override {
    const Pair& pair = (part == Part::kTrain ? train_ : held_out_)[static_cast<size_t>(index)];
    const auto bytes_each = static_cast<size_t>((length - 1) / 2);
    TaskSample s;
    append(pair.first.substr(0, bytes_each), s.input);
    s.input.push_back(kSeparator);
    append(pair.second.substr(0, bytes_each), s.input);
    s.target.assign(s.input.size(), kIgnored);
    s.target.back() = pair.cites ? 2 : 1;
    return s;
  }

 private:
  static void append(std::string_view text, std::vector<int64_t>& tokens) {
    for (const char byte : text) tokens.push_back(1 + static_cast<unsigned char>(byte));
  }

  void add(std::vector<Pair>& pairs, const std::string& path) {
    const MappedFile& file = files_.emplace_back(open(path));
    std::string_view rest(reinterpret_cast<const char*>(file.data()), file.size());
    for (int64_t number = 1; !rest.empty(); ++number) {
      const size_t end = std::min(rest.find('\n'), rest.size());
      pairs.push_back(parsed(rest.substr(0, end), path, number));
      rest.remove_prefix(std::min(end + 1, rest.size()));
    }
  }

  Pair parsed(std::string_view line, const std::string& path, int64_t number) const {
    const std::string place = "line " + std::to_string(number);
    std::array<std::string_view, kColumns> columns;
    size_t count = 0;
    for (bool more = true; more; ++count) {
      const size_t tab = line.find('\t');
      more = tab != std::string_view::npos;
      if (count < kColumns) columns[count] = line.substr(0, tab);
      line.remove_prefix(more ? tab + 1 : line.size());
    }
    if (count != kColumns)
      refuse(path, place + " has " + std::to_string(count) + " columns, expected 5");
    const std::string_view label = columns[0];
    const bool yes = label == "1" || label == "1.0", no = label == "0" || label == "0.0";
    if (!yes && !no)
      refuse(path, place + " has the label \"" + std::string(label.substr(0, 20)) +
                       "\", expected 0 or 1 (or 0.0, 1.0)");
    return {yes, columns[3], columns[4]};
  }

  std::vector<MappedFile> files_;
  std::vector<Pair> train_, held_out_;
};

}  // namespace

std::unique_ptr<Task> make_paper_pairs(const TaskOptions& options) {
  return std::make_unique<PaperPairs>(options);
}

}  // namespace xlstm::data
