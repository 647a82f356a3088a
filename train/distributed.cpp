#include "train/distributed.h"

#include <ATen/Context.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/tensor.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <optional>
#include <stop_token>
#include <thread>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <utility>

#include "csrc/config/text.h"
#include "csrc/core/error.h"
#include "train/distributed_backends.h"

namespace xlstm::train {
namespace {

/// As long as the others may be busy: process 0 saves, or prepares the data.
constexpr std::chrono::minutes kPatience{30};
/// How long they may take to come, and how long that is waited for in silence.
constexpr std::chrono::minutes kTimeToMeet{10};
constexpr std::chrono::seconds kSilence{5};
constexpr std::chrono::milliseconds kBetweenLooks{50};

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}

int64_t whole_number(const char* name, int64_t least = 0,
                     int64_t most = std::numeric_limits<int>::max()) {
  const std::string text = variable(name);
  const auto value = config::parse_int(text);
  if (!value || *value < least || *value > most)
    throw Error(ExitCode::kConfig,
                std::string("WORLD_SIZE is set, but ") + name + " is " +
                    (text.empty() ? "not"
                                  : config::in_quotes(text) + ", expected " +
                                        std::to_string(least) + " to " + std::to_string(most)) +
                    "; torchrun sets both: torchrun --nproc-per-node N --no-python xlstm-train "
                    "CONFIG.yaml (unset WORLD_SIZE for one process)");
  return *value;
}

/// Where the processes of a run come together before they can talk: a store of keys that process 0 or torchrun's agent serves.
class MeetingPlace {
 public:
  MeetingPlace(const ProcessPlace& place, const std::function<void()>& poll)
      : place_(place),
        host_(variable("MASTER_ADDR").empty() ? "localhost" : variable("MASTER_ADDR")),
        port_(whole_number("MASTER_PORT", 1, 65535)),
        poll_(poll) {}

  /// The store, once all have come to it.
  c10::intrusive_ptr<c10d::Store> meet() {
    // What an earlier attempt left there is not read.
    const auto store = c10::make_intrusive<c10d::PrefixStore>(
        "libxlstm/attempt-" + variable("TORCHELASTIC_RESTART_COUNT"), connect());
    store->set(key(place_.rank), kHere);
    // Process 0 looks for each of the others, and these for its word alone.
    std::vector<std::string> keys{kAll};
    if (place_.leads()) {
      keys.clear();
      for (int64_t rank = 1; rank < place_.size; ++rank) keys.push_back(key(rank));
    }
    while (!store->check(keys)) {
      if (waited() > kSilence && !told_) tell(missing(*store));
      if (waited() > kTimeToMeet)
        throw Error(ExitCode::kPeer, who() + ": " + missing(*store) + " did not come to " +
                                         address() + " in " + std::to_string(kTimeToMeet.count()) +
                                         " minutes; what it says there tells why");
      poll_();
      std::this_thread::sleep_for(kBetweenLooks);
    }
    if (place_.leads()) store->set(kAll, kHere);
    return store;
  }

 private:
  /// Waits for the server.
  c10::intrusive_ptr<c10d::Store> connect() {
    c10d::TCPStoreOptions options;
    options.port = static_cast<std::uint16_t>(port_);
    const bool agent = variable("TORCHELASTIC_USE_AGENT_STORE") == "True";
    options.isServer = place_.leads() && !agent;
    options.numWorkers = static_cast<size_t>(place_.size);
    options.waitWorkers = false;
    options.timeout = kTimeToMeet;
    const std::jthread teller([&](const std::stop_token& connected) {
      std::mutex mutex;
      std::unique_lock lock(mutex);
      std::condition_variable_any().wait_for(lock, connected, kSilence, [] { return false; });
      if (!connected.stop_requested()) tell(agent ? "torchrun's agent" : "process 0");
    });
    return c10::make_intrusive<c10d::TCPStore>(host_, options);
  }

  static inline const std::string kAll = "all";
  static inline const std::vector<uint8_t> kHere{1};

  static std::string key(int64_t rank) { return "process-" + std::to_string(rank); }
  std::string who() const {
    return "process " + std::to_string(place_.rank) + " of " + std::to_string(place_.size);
  }
  std::string address() const { return host_ + ":" + std::to_string(port_); }
  std::chrono::steady_clock::duration waited() const {
    return std::chrono::steady_clock::now() - start_;
  }

  void tell(const std::string& whom) {
    told_ = true;
    std::fprintf(stderr, "%s waits for %s to come to %s, for up to %lld minutes\n", who().c_str(),
                 whom.c_str(), address().c_str(), static_cast<long long>(kTimeToMeet.count()));
  }

  /// "processes 1, 2, 3 and 4 more"
  std::string missing(c10d::Store& store) const {
    std::string named;
    int64_t count = 0;
    for (int64_t rank = 0; rank < place_.size; ++rank) {
      if (store.check({key(rank)}) || ++count > 3) continue;
      named += (count > 1 ? ", " : "") + std::to_string(rank);
    }
    return (count == 1 ? "process " : "processes ") + named +
           (count > 3 ? " and " + std::to_string(count - 3) + " more" : "");
  }

  const ProcessPlace place_;
  const std::string host_;
  const int64_t port_;
  const std::function<void()>& poll_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  bool told_ = false;
};

}  // namespace

ProcessPlace place_from_environment() {
  if (variable("WORLD_SIZE").empty()) return {};
  ProcessPlace place;
  place.size = whole_number("WORLD_SIZE");
  if (place.size <= 1) return {};
  place.rank = whole_number("RANK");
  place.local_rank = whole_number("LOCAL_RANK");
  if (place.rank >= place.size)
    throw Error(ExitCode::kConfig, "RANK is " + std::to_string(place.rank) +
                                       ", but WORLD_SIZE is " + std::to_string(place.size));
  return place;
}

void take_own_gpu(const ProcessPlace& place) {
  if (place.alone() || !at::hasCUDA()) return;
  const c10::impl::VirtualGuardImpl guard(at::kCUDA);
  const int64_t gpus = guard.deviceCount();
  if (place.local_rank >= gpus)
    throw Error(ExitCode::kConfig,
                "this machine has " + std::to_string(gpus) +
                    " GPUs, too few for one per process; start torchrun with --nproc-per-node " +
                    std::to_string(gpus) + ", or train with run.device=cpu");
  guard.setDevice({at::kCUDA, static_cast<at::DeviceIndex>(place.local_rank)});
}

struct ProcessGroup::Impl {
  c10::intrusive_ptr<c10d::Store> store;
  BackendPtr host;    ///< numbers and tensors of the CPU
  BackendPtr device;  ///< tensors of the GPU; null for a run on the CPU

  c10d::Backend& of(const at::Tensor& tensor) const { return tensor.is_cpu() ? *host : *device; }
};

template <typename Work>
auto ProcessGroup::guarded(Work&& work) {
  try {
    return work();
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    throw Error(ExitCode::kPeer, "process " + std::to_string(place_.rank) + " of " +
                                     std::to_string(place_.size) +
                                     ": another process failed or does not answer; its own "
                                     "message says why (here: " +
                                     config::first_line(error.what()) + ")");
  }
}

ProcessGroup::ProcessGroup(const ProcessPlace& place, at::Device device,
                           const std::function<void()>& poll)
    : place_(place) {
  if (place.alone()) return;
  guarded([&] {
    impl_ = std::make_unique<Impl>();
    impl_->store = MeetingPlace(place, poll).meet();
    const auto join = [&](auto make, const char* name) {
      return make(c10::make_intrusive<c10d::PrefixStore>(name, impl_->store),
                  static_cast<int>(place.rank), static_cast<int>(place.size), kPatience);
    };
    impl_->host = join(make_gloo, "host");
    if (!device.is_cpu()) impl_->device = join(make_nccl, "device");
  });
}

ProcessGroup::~ProcessGroup() = default;

int64_t ProcessGroup::sum(int64_t value) {
  if (place_.alone()) return value;
  const at::Tensor all = at::tensor(value, at::kLong);
  sum(all);
  return all.item<int64_t>();
}

void ProcessGroup::sum(std::vector<double>& values) {
  if (place_.alone()) return;
  sum(at::from_blob(values.data(), {static_cast<int64_t>(values.size())}, at::kDouble));
}

void ProcessGroup::sum(const at::Tensor& tensor) {
  if (!place_.alone()) begin_sum(tensor)();
}

ProcessGroup::Wait ProcessGroup::begin_sum(const at::Tensor& tensor) {
  std::vector<at::Tensor> one{tensor};
  auto work = guarded([&] { return impl_->of(tensor).allreduce(one); });
  return [this, work, tensor] { guarded([&] { work->wait(); }); };
}

bool ProcessGroup::any(bool value) { return sum(int64_t{value}) > 0; }

// By the names of torch 2.11, which later ones still know.
ProcessGroup::Wait ProcessGroup::all_gather(at::Tensor whole, at::Tensor part) {
  auto work = guarded([&] { return impl_->of(whole)._allgather_base(whole, part); });
  return [this, work] { guarded([&] { work->wait(); }); };
}

ProcessGroup::Wait ProcessGroup::reduce_scatter(at::Tensor part, at::Tensor whole) {
  auto work = guarded([&] { return impl_->of(whole)._reduce_scatter_base(part, whole); });
  return [this, work, part, whole] { guarded([&] { work->wait(); }); };
}

void ProcessGroup::broadcast(const std::vector<at::Tensor>& tensors,
                             const std::vector<int64_t>& from) {
  if (place_.alone()) return;
  guarded([&] {
    std::vector<c10::intrusive_ptr<c10d::Work>> under_way;
    for (size_t i = 0; i < tensors.size(); ++i) {
      std::vector<at::Tensor> one{tensors[i]};
      c10d::BroadcastOptions options;
      options.rootRank = from.empty() ? 0 : from[i];
      under_way.push_back(impl_->of(tensors[i]).broadcast(one, options));
    }
    for (const auto& work : under_way) work->wait();
  });
}

std::string ProcessGroup::broadcast(const std::string& text) {
  if (place_.alone()) return text;
  const at::Tensor length = at::tensor(static_cast<int64_t>(text.size()), at::kLong);
  broadcast(std::vector<at::Tensor>{length});
  std::string all = text;
  all.resize(static_cast<size_t>(length.item<int64_t>()));
  if (!all.empty())
    broadcast(std::vector<at::Tensor>{
        at::from_blob(all.data(), {static_cast<int64_t>(all.size())}, at::kByte)});
  return all;
}

void ProcessGroup::send(const at::Tensor& tensor, int64_t to) { begin_send(tensor, to)(); }

ProcessGroup::Wait ProcessGroup::begin_send(const at::Tensor& tensor, int64_t to) {
  std::vector<at::Tensor> one{tensor};
  auto work = guarded([&] { return impl_->of(tensor).send(one, static_cast<int>(to), /*tag=*/0); });
  return [this, work, tensor] { guarded([&] { work->wait(); }); };
}

void ProcessGroup::receive(const at::Tensor& tensor, int64_t from) {
  guarded([&] {
    std::vector<at::Tensor> one{tensor};
    impl_->of(tensor).recv(one, static_cast<int>(from), /*tag=*/0)->wait();
  });
}

void ProcessGroup::barrier() { sum(0); }

}  // namespace xlstm::train
