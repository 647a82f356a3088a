#pragma once
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace xlstm::ops {

/// Whether autocast is on for a kind of device; of those that have none, the meta device, torch's own question is an error.
inline bool autocast_is_on(c10::DeviceType device) {
  return at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device);
}

/// While one lives, operators of this thread take their arguments as they are.
struct WithoutAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

}  // namespace xlstm::ops
