#include "train/run_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "csrc/core/error.h"
#include "csrc/core/file.h"

namespace xlstm::train {
namespace {

namespace fs = std::filesystem;

constexpr const char* kLock = "lock";
constexpr const char* kProbe = ".write-probe";

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  throw Error(ExitCode::kCheckpoint,
              "run folder " + path + ": " + what +
                  "; choose another with run.out_dir=FOLDER or run.name=NAME");
}

/// Files beside what an interrupted start leaves behind.
bool holds_anything(const std::string& path) {
  for (const auto& entry : fs::directory_iterator(path)) {
    const std::string name = entry.path().filename();
    if (name != kLock && name != kProbe && entry.path().extension() != ".tmp") return true;
  }
  return false;
}

std::string first_free_name(const std::string& stem) {
  for (int number = 1;; ++number) {
    std::string name = stem + std::to_string(number);
    if (!fs::exists(name)) return name;
  }
}

}  // namespace

std::string run_path(const config::RunConfig& run) {
  return (fs::path(run.out_dir) / run.name).lexically_normal().string();
}

bool finds_run(const config::RunConfig& run, bool fresh) {
  if (fresh && checkpoint_step(run.resume) >= 0)
    throw Error(ExitCode::kConfig, "run.resume: goes on from " + run.resume +
                                       ", but --fresh starts over; give one of them");
  const std::string path = run_path(run);
  if (fs::exists(path) && !fs::is_directory(path)) refuse(path, "is a file");
  if (fresh || !fs::exists(path)) return false;
  const fs::path ckpt = fs::path(path) / "ckpt";
  if (fs::exists(fs::symlink_status(ckpt)) && !fs::is_directory(ckpt))
    refuse(path, "its ckpt is a file, or a link to a folder that is not there");
  for (const char* name : {"run.json", "run.log", "metrics.jsonl", "ckpt"}) {
    if (fs::exists(fs::path(path) / name)) return true;
  }
  if (holds_anything(path))
    refuse(path, "not empty, and not a run (no run.json): it is left alone");
  return false;
}

RunFolder::RunFolder(const config::RunConfig& run, bool fresh) : path_(run_path(run)) {
  try {
    finds_run(run, fresh);  // before anything is created
    create_and_lock();
    held_run_ = finds_run(run, fresh);  // no other process changes it any more
    probe();
  } catch (const std::system_error& error) {  // fs::filesystem_error included
    refuse(path_, "cannot be written: " + error.code().message());
  }
}

std::string RunFolder::start_over() {
  try {
    if (!holds_anything(path_)) return "";
    const std::string moved_to = first_free_name(path_ + ".old-");
    fs::rename(path_, moved_to);
    const Lock before(std::move(lock_));  // held until the new one is: nobody comes between
    create_and_lock();
    return moved_to;
  } catch (const std::system_error& error) {
    refuse(path_, "cannot be moved aside: " + error.code().message());
  }
}

void RunFolder::Lock::release() {
  if (fd >= 0) ::close(std::exchange(fd, -1));
}

void RunFolder::create_and_lock() {
  fs::create_directories(path_);
  const std::string lock = file(kLock);
  lock_.fd = ::open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (lock_.fd < 0) throw std::system_error(errno, std::generic_category(), lock);
  if (::flock(lock_.fd, LOCK_EX | LOCK_NB) != 0) {
    const int error = errno;
    char owner[32] = "";
    const ssize_t length = ::pread(lock_.fd, owner, sizeof owner - 1, 0);
    lock_.release();
    if (error != EWOULDBLOCK) throw std::system_error(error, std::generic_category(), lock);
    const std::string pid(owner, length > 0 ? static_cast<size_t>(length) : 0);
    refuse(path_, "another xlstm-train (pid " + pid.substr(0, pid.find('\n')) +
                      ") trains here: wait for it or stop it");
  }
  if (!lock_is_in_place()) {  // another process has moved the folder aside meanwhile
    lock_.release();
    return create_and_lock();
  }
  const std::string pid = std::to_string(::getpid()) + "\n";
  // The number only serves the message above: a disk too full for it fails the probe right after.
  if (::ftruncate(lock_.fd, 0) != 0 || ::pwrite(lock_.fd, pid.data(), pid.size(), 0) < 0) {
    throw std::system_error(errno, std::generic_category(), lock);
  }
}

bool RunFolder::lock_is_in_place() const {
  struct stat held {
  }, named{};
  return ::fstat(lock_.fd, &held) == 0 && ::stat(file(kLock).c_str(), &named) == 0 &&
         held.st_dev == named.st_dev && held.st_ino == named.st_ino;
}

void RunFolder::probe() const {
  OutputFile probe(file(kProbe));
  probe.write(std::string(1 << 12, '\0'));
  probe.sync_and_close();
  fs::remove(probe.path());
}

int64_t free_disk_bytes(const std::string& path) {
  struct statvfs info {};
  if (::statvfs(path.c_str(), &info) != 0) return -1;
  return static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize);
}

}  // namespace xlstm::train
