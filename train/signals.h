#pragma once

namespace xlstm::train {

/// From now on SIGTERM, SIGINT and SIGUSR1 ask the run to save and stop after the current step; a
/// second SIGINT exits at once with status 130. SIGPIPE, SIGXFSZ and SIGHUP are ignored: a closed
/// terminal or a full disk is seen by the call that fails, and the run goes on in its log file.
void install_signal_handlers();
/// Name of the signal that asked to stop, null where none has.
const char* stop_requested();
/// Thrown where work ends because a signal has asked for it.
struct Stopped {
  const char* signal;
};
/// Throws Stopped where a signal has asked to stop.
void throw_if_stop_requested();
/// Forgets an earlier request (tests run several trainers in one process).
void clear_stop_request();

}  // namespace xlstm::train
