#pragma once
#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <future>
#include <string>
#include <vector>

#include "tests/support/catch.h"
#include "train/distributed.h"

namespace xlstm::train {

/// Processes of a run as threads of this one.
class ProcessesHere {
 public:
  ProcessesHere() {
    ::setenv("MASTER_ADDR", "127.0.0.1", 1);
    ::setenv("GLOO_SOCKET_IFNAME", "lo", 1);
    ::setenv("MASTER_PORT", std::to_string(free_port()).c_str(), 1);
  }
  ~ProcessesHere() {
    for (const char* name : {"MASTER_ADDR", "GLOO_SOCKET_IFNAME", "MASTER_PORT"}) ::unsetenv(name);
  }
  ProcessesHere(const ProcessesHere&) = delete;
  ProcessesHere& operator=(const ProcessesHere&) = delete;

  template <class Work>
  void run(int64_t processes, const Work& work) const {
    std::vector<std::future<void>> all;
    for (int64_t rank = 0; rank < processes; ++rank) {
      all.push_back(std::async(std::launch::async, [=, &work] {
        ProcessGroup group({rank, processes, rank}, at::kCPU);
        work(group);
        group.barrier();
      }));
    }
    for (auto& one : all) one.get();
  }

 private:
  static int free_port() {
    const int socket = ::socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    auto* const any = reinterpret_cast<sockaddr*>(&address);
    REQUIRE(::bind(socket, any, size) == 0);
    REQUIRE(::getsockname(socket, any, &size) == 0);
    ::close(socket);
    return ntohs(address.sin_port);
  }
};

}  // namespace xlstm::train
