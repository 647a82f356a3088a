#pragma once
// For operators that are made of ATen calls.
#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace xlstm::ops {

/// float32 products stay float32: neither TF32 nor an autocast region around the caller may touch them.
struct FullPrecision {
  at::NoTF32Guard no_tf32;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  at::AutoDispatchBelowADInplaceOrView no_autograd;
};

}  // namespace xlstm::ops
