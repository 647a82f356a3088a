#pragma once
#include <ATen/autocast_mode.h>

namespace xlstm::ops {

/// Whether autocast is on for a kind of device; of those that have none, the meta device, torch's own question is an error.
inline bool autocast_is_on(c10::DeviceType device) {
  return at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device);
}

}  // namespace xlstm::ops
