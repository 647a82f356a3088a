#include "train/signals.h"

#include <unistd.h>

#include <csignal>
#include <initializer_list>

namespace xlstm::train {
namespace {

volatile std::sig_atomic_t requested = 0;

void handle(int signal) {
  if (signal == SIGINT && requested == SIGINT) ::_exit(128 + SIGINT);
  requested = signal;
}

}  // namespace

void install_signal_handlers() {
  struct sigaction action {};
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  action.sa_handler = handle;
  for (const int signal : {SIGTERM, SIGINT, SIGUSR1}) ::sigaction(signal, &action, nullptr);
  action.sa_handler = SIG_IGN;
  for (const int signal : {SIGPIPE, SIGXFSZ, SIGHUP}) ::sigaction(signal, &action, nullptr);
}

const char* stop_requested() {
  switch (requested) {
    case SIGTERM:
      return "SIGTERM";
    case SIGINT:
      return "SIGINT";
    case SIGUSR1:
      return "SIGUSR1";
    default:
      return nullptr;
  }
}

void throw_if_stop_requested() {
  if (const char* signal = stop_requested()) throw Stopped{signal};
}

void clear_stop_request() { requested = 0; }

}  // namespace xlstm::train
