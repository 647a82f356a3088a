#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>

#include "train/log.h"
#include "train/metrics.h"

namespace xlstm::train {
namespace {

// Protocol-buffer wire format. Field numbers: Event {wall_time=1 double, step=2 int64,
// file_version=3 string, summary=5, session_log=7}, Summary {value=1}, Value {tag=1 string,
// simple_value=2 float}, SessionLog {status=1}.
enum WireType { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

void append_varint(std::string& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out += static_cast<char>((value & 0x7f) | 0x80);
  out += static_cast<char>(value);
}

void append_tag(std::string& out, int field, WireType type) {
  append_varint(out, static_cast<uint64_t>(field) << 3 | type);
}

template <typename Unsigned>
void append_little_endian(std::string& out, Unsigned value) {
  for (size_t i = 0; i < sizeof value; ++i) out += static_cast<char>(value >> (8 * i) & 0xff);
}

void append_bytes(std::string& out, int field, const std::string& bytes) {
  append_tag(out, field, kBytes);
  append_varint(out, bytes.size());
  out += bytes;
}

/// An Event with its time and step; the caller appends what happened.
std::string begin_event(int64_t step) {
  const double time =
      std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  std::string event;
  append_tag(event, 1, kFixed64);
  append_little_endian(event, std::bit_cast<uint64_t>(time));
  append_tag(event, 2, kVarint);
  append_varint(event, static_cast<uint64_t>(step));
  return event;
}

std::string encode_scalar(const std::string& key, double value) {
  std::string scalar;
  append_bytes(scalar, 1, key);
  append_tag(scalar, 2, kFixed32);
  append_little_endian(scalar, std::bit_cast<uint32_t>(static_cast<float>(value)));
  return scalar;
}

constexpr std::array<uint32_t, 256> make_crc_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) value = value & 1 ? value >> 1 ^ 0x82F63B78u : value >> 1;
    table[i] = value;
  }
  return table;
}

/// TFRecord's guard against checksums of data that holds checksums.
uint32_t masked_crc32c(const std::string& bytes) {
  const uint32_t crc = crc32c(bytes.data(), bytes.size());
  return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

}  // namespace

uint32_t crc32c(const void* data, size_t size_bytes) {
  static constexpr std::array<uint32_t, 256> kTable = make_crc_table();
  const auto* bytes = static_cast<const unsigned char*>(data);
  uint32_t crc = ~0u;
  for (size_t i = 0; i < size_bytes; ++i) crc = kTable[(crc ^ bytes[i]) & 0xff] ^ crc >> 8;
  return ~crc;
}

TensorboardWriter::TensorboardWriter(const std::string& folder, int64_t first_step) {
  std::error_code ignored;
  std::filesystem::create_directories(folder, ignored);
  char host[128] = "localhost";
  ::gethostname(host, sizeof host - 1);
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(
      std::chrono::system_clock::now().time_since_epoch());
  const std::string path = folder + "/events.out.tfevents." + std::to_string(seconds.count()) +
                           "." + host + "." + std::to_string(::getpid());
  fd_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (fd_ < 0) {
    log_warning(path + ": cannot open: " + std::strerror(errno) +
                "; no TensorBoard events are written");
    return;
  }
  std::string event = begin_event(0);
  append_bytes(event, 3, "brain.Event:2");
  write_record(event);
  if (first_step > 0) {
    event = begin_event(first_step);
    append_bytes(event, 7, std::string("\x08\x01", 2));  // SessionLog {status: START}
    write_record(event);
  }
}

TensorboardWriter::~TensorboardWriter() {
  if (fd_ >= 0) ::close(fd_);
}

void TensorboardWriter::write_metrics(int64_t step, const Metrics& metrics) {
  if (fd_ < 0) return;
  std::string summary;
  for (const auto& [key, value] : metrics) append_bytes(summary, 1, encode_scalar(key, value));
  std::string event = begin_event(step);
  append_bytes(event, 5, summary);
  write_record(event);
}

void TensorboardWriter::write_record(const std::string& event) {
  std::string length;
  append_little_endian(length, static_cast<uint64_t>(event.size()));
  std::string record = length;
  append_little_endian(record, masked_crc32c(length));
  record += event;
  append_little_endian(record, masked_crc32c(event));
  if (::write(fd_, record.data(), record.size()) != static_cast<ssize_t>(record.size())) {
    // A torn record ends the file for every reader; the numbers are in metrics.jsonl as well.
    log_warning(std::string("TensorBoard events stop here: ") + std::strerror(errno));
    ::close(fd_);
    fd_ = -1;
  }
}

}  // namespace xlstm::train
