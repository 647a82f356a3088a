#pragma once
// For what is made of ATen calls.
#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace xlstm::ops {

/// float32 products of this thread stay float32: neither TF32 nor an autocast region around the caller may touch them.
struct FullFloat {
  at::NoTF32Guard no_tf32;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

/// The same without a graph: for operators that have their gradients written out.
struct FullPrecision : FullFloat {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
};

}  // namespace xlstm::ops
