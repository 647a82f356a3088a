#include "csrc/data/tokenizer_process.h"

#include <cstring>
#include <nlohmann/json.hpp>

#include "csrc/core/error.h"
#include "csrc/data/child_process.h"

namespace xlstm::data {
namespace {

constexpr uint64_t kMaxReply = uint64_t{1} << 40;

class ProcessTokenizer final : public Tokenizer {
 public:
  ProcessTokenizer(std::vector<std::string> command, const std::string& name,
                   const std::string& sha256)
      : name_(name), python_(command.front()), child_(std::move(command)), sha256_(sha256) {
    const std::string text = receive('H');
    const auto hello = nlohmann::json::parse(text, nullptr, false);
    if (!hello.is_object()) fail("its process sent an unexpected reply");
    vocab_size_ = hello.value("vocab_size", int64_t{0});
    eos_id_ = hello.value("eos_id", int64_t{-1});
    bos_id_ = hello.value("bos_id", int64_t{-1});
    if (vocab_size_ < 1) fail("its vocabulary is empty; use another tokenizer");
  }

  std::vector<int64_t> encode(std::string_view text) override {
    return std::move(encode_batch({text}).front());
  }

  std::vector<std::vector<int64_t>> encode_batch(
      const std::vector<std::string_view>& texts) override {
    return encode_as('E', texts);
  }

  std::vector<std::vector<int64_t>> encode_inside(
      const std::vector<std::string_view>& texts) override {
    return encode_as('I', texts);
  }

  std::string decode(const std::vector<int64_t>& ids) override {
    send_header('D', 8 * ids.size());
    send(ids.data(), 8 * ids.size());
    return receive('D');
  }
  int64_t vocab_size() const override { return vocab_size_; }
  int64_t eos_id() const override { return eos_id_; }
  int64_t bos_id() const override { return bos_id_; }
  std::string sha256() const override { return sha256_; }

 private:
  std::vector<std::vector<int64_t>> encode_as(char request,
                                              const std::vector<std::string_view>& texts) {
    uint64_t size = 8;
    for (const auto text : texts) size += 8 + text.size();
    send_header(request, size);
    send_number(texts.size());
    for (const auto text : texts) {
      send_number(text.size());
      send(text.data(), text.size());
    }
    return parse_encoded(receive(request), texts.size());
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(ExitCode::kData, "tokenizer " + name_ + ": " + what);
  }
  [[noreturn]] void fail_ended() {
    fail("its process (" + python_ + ") ended with " + child_.wait_for_end() +
         "; check that this Python runs, or name another by XLSTM_PYTHON");
  }
  void send(const void* data, size_t size_bytes) {
    if (!child_.send(data, size_bytes)) fail_ended();
  }
  void send_number(uint64_t value) { send(&value, sizeof value); }
  void send_header(char kind, uint64_t size) {
    send(&kind, 1);
    send_number(size);
  }
  std::string receive(char expected) {
    char kind = 0;
    uint64_t size = 0;
    if (!child_.receive(&kind, 1) || !child_.receive(&size, sizeof size)) fail_ended();
    if ((kind != expected && kind != 'X') || size > kMaxReply)
      fail("its process sent an unexpected reply");
    std::string payload(size, '\0');
    if (!child_.receive(payload.data(), payload.size())) fail_ended();
    if (kind == 'X') fail(payload);
    return payload;
  }
  std::vector<std::vector<int64_t>> parse_encoded(const std::string& payload, size_t count) const {
    std::vector<uint64_t> lengths(count);
    if (payload.size() < 8 * count) fail("its process sent a short reply");
    std::memcpy(lengths.data(), payload.data(), 8 * count);
    uint64_t left = (payload.size() - 8 * count) / sizeof(int32_t);
    const char* next = payload.data() + 8 * count;
    std::vector<std::vector<int64_t>> result;
    for (const uint64_t length : lengths) {
      if (length > left) fail("its process sent a short reply");
      left -= length;
      std::vector<int64_t> ids(length);
      for (auto& id : ids) {
        int32_t value = 0;
        std::memcpy(&value, next, sizeof value);
        id = value;
        next += sizeof value;
      }
      result.push_back(std::move(ids));
    }
    return result;
  }

  std::string name_, python_;
  ChildProcess child_;
  std::string sha256_;
  int64_t vocab_size_ = 0, eos_id_ = -1, bos_id_ = -1;
};

}  // namespace

std::unique_ptr<Tokenizer> make_process_tokenizer(const std::vector<std::string>& files,
                                                  const std::string& sha256) {
  std::vector<std::string> command{python_interpreter(), "-c", kTokenizerWorker};
  command.insert(command.end(), files.begin(), files.end());
  return std::make_unique<ProcessTokenizer>(std::move(command), files.front(), sha256);
}

}  // namespace xlstm::data
