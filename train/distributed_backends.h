#pragma once
#include <c10/core/Device.h>

#include <chrono>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

namespace xlstm::train {

using BackendPtr = c10::intrusive_ptr<c10d::Backend>;

/// Collectives of one kind, met by way of `store`. One file each, because their headers need others that are not
/// everywhere.
BackendPtr make_gloo(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                     std::chrono::milliseconds timeout);
/// Throws Error(kConfig) in a build without NCCL.
BackendPtr make_nccl(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                     std::chrono::milliseconds timeout);

}  // namespace xlstm::train
