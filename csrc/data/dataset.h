#pragma once
// Windows of tokens in a stateless order.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "csrc/data/batch.h"
#include "csrc/data/token_file.h"

namespace xlstm::data {

struct DatasetOptions {
  int64_t seq_len = 256;
  bool shuffle = true;
  uint64_t seed = 1234;
  bool reset_state_at_document = true;
  bool mask_loss_across_documents = true;
  /// Samples i, i + streams, i + 2 streams, ... go on in one another; 0: each is from anywhere. See Dataset.
  int64_t streams = 0;
  /// Of held-out sets: each document is judged alone, whatever stands above. Its windows begin with it, and the last of a
  /// longer one begins earlier, so that it is full; what was scored before does not count again.
  bool fill_last_window = false;
};

struct WeightedFile {
  std::shared_ptr<const TokenFile> file;
  double weight = 1.0;
};

/// A mixture of token files cut into windows of seq_len+1 tokens that overlap by one. Throws Error(kData) when a file
/// holds fewer than seq_len+1 tokens, or none that counts.
///
/// A file of N tokens gives n = (N-1)/seq_len windows per epoch, each once, in the order of `permute`; its epochs are
/// counted for itself. The (N-1) % seq_len tokens that are left over lie before and behind the windows: their number
/// before is drawn anew each epoch when shuffling (so that no token is always left out), else all lie behind. In a
/// mixture each file gets its share of samples evenly (csrc/data/sampling.h). Tokens that do not count in the loss
/// (TokenFile::read_counted) are inputs like others and no targets; in a window none may count.
///
/// With streams S, samples i, i + S, i + 2S, ... are stream i mod S. Each file has its share of the streams, at least
/// one; an epoch cuts it into that many parts of n / streams windows, whose windows a stream reads in order, another part
/// in each epoch when shuffling. A stream's first window of an epoch begins with a reset, the others only where a
/// document starts.
class Dataset final : public SampleSource {
 public:
  Dataset(std::vector<WeightedFile> files, const DatasetOptions& options);
  /// Windows of one pass over all files.
  int64_t samples_per_epoch() const override;
  /// Order, shuffle per epoch and mixture follow from the index.
  Batch batch(int64_t first_sample, int64_t count) const override;

 private:
  std::string fingerprint_in(int order) const override;
  struct Source;
  struct Schedule;
  void share_streams();
  /// Where a sample stands.
  struct Place {
    const Source* source;
    int64_t first;  ///< its first token
    bool begins;    ///< it goes on from nothing
  };
  Place place_of(int64_t sample) const;
  Place place_in_stream(int64_t sample) const;
  int64_t in_order(const Source& source, int64_t index, int64_t count, int64_t epoch) const;
  int64_t tokens_before(const Source& source, int64_t epoch) const;
  std::vector<std::shared_ptr<Source>> sources_;
  std::shared_ptr<const Schedule> schedule_;
  DatasetOptions options_;
};

/// A held-out file in order, once: window w is tokens [w*T, w*T+T], the last one shorter (windows are padded with
/// target -100; none is longer than all the text), so that every token that counts, but the first of each document, is scored
/// exactly once; with fill_last_window each document is cut so.
class EvalSet final : public HeldOutSet {
 public:
  EvalSet(std::shared_ptr<const TokenFile> file, const DatasetOptions& options);
  int64_t num_windows() const override;
  Batch batch(int64_t first_window, int64_t count) const override;
  /// Targets but the tokens that end a document, each at the mean size of the file's tokens of text: exact for bytes. 0
  /// without sidecar.
  double text_bytes(const Batch& batch) const override;
  std::string name() const override { return file_->prefix(); }
  std::string fingerprint() const override { return file_->fingerprint(); }

 private:
  struct Window {
    int64_t first = 0, count = 0;  ///< its inputs
    int64_t before = 0;            ///< of them, whose targets do not count
  };
  Window window(int64_t index) const;
  int64_t text_targets(const Window& cut) const;
  int64_t counted_ends() const;

  std::shared_ptr<const TokenFile> file_;
  DatasetOptions options_;
  std::vector<Window> windows_;  ///< with fill_last_window alone
  bool has_ends_ = false;        ///< each document ends in a token of its own
  double bytes_per_text_token_ = 0;
};

/// Bijection of [0, n) keyed by (seed, epoch): Feistel rounds with cycle walking, O(1) memory. order: 2, twelve rounds,
/// as good as a random order for every n; 1, the four rounds of earlier versions, where neighbours stay neighbours more
/// often than by chance.
uint64_t permute(uint64_t index, uint64_t n, uint64_t seed, uint64_t epoch,
                 int order = kOrderVersion);

}  // namespace xlstm::data
