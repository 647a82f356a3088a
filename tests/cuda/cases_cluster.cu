// Clusters, remote shared memory, the pool of registers (sm_90a).
#include "tests/cuda/conformance.h"

namespace conformance {
namespace {

KERNEL_FUNCTION(32) exchange_kernel(Words p) {
#if PRIM_HAS_SM90A
  u32* s = reinterpret_cast<u32*>(prim::dynamic_shared());
  const u32 t = prim::thread_idx().x, rank = prim::cluster_rank(), size = prim::cluster_size();
  u32* out = p.out + 96 * prim::block_idx().x;
  s[32 + t] = p.in[32 * prim::block_idx().x + t];
  prim::cluster_sync();
  prim::remote_store(s + t, (rank + 1) % size, p.in[32 * prim::block_idx().x + t] + 1);
  out[t] = prim::remote_load(s + 32 + (t + 1) % 32, (rank + 2) % size);
  prim::cluster_arrive();
  out[32 + t] = 10 * size + rank;  // between the halves of the barrier
  prim::cluster_wait();
  out[64 + t] = s[t];
#endif
}

KERNEL_FUNCTION(64) exit_kernel(Words p) {  // the barrier counts threads that have not exited
#if PRIM_HAS_SM90A
  if (prim::cluster_rank() == 1 && prim::thread_idx().x < 32) return;
  prim::cluster_sync();
  prim::atomic_add(p.out, 1);
  prim::cluster_sync();
  prim::atomic_add(p.out + 1, 1);
#endif
}

KERNEL_FUNCTION(32) remote_kernel(Words p) {  // every block sends to the next one
#if PRIM_HAS_SM90A
  u64* bar = barriers();
  u32* s = reinterpret_cast<u32*>(bar + 2);
  const u32 t = prim::thread_idx().x, rank = prim::cluster_rank(), next = (rank + 1) % 4;
  const u32* in = p.in + 512 * rank;
  u32* out = p.out + 320 * rank;
  if (t == 0) {
    prim::mbar_init(bar, 1);
    prim::mbar_init(bar + 1, 32);
    prim::fence_mbar_init();
  }
  prim::cluster_sync();
  if (t == 0) prim::mbar_arrive_expect_tx(bar, 6 * 128);
  s[96 + t] = in[t];
  prim::fence_proxy_async();
  prim::sync_block();
  prim::st_async(s + t, next, in[32 + t], bar);
  const u32 four[4] = {in[64 + 4 * t], in[65 + 4 * t], in[66 + 4 * t], in[67 + 4 * t]};
  prim::st_async_x4(s + 128 + 4 * t, next, four, bar);
  if (t == 0) prim::bulk_copy_remote(s + 64, next, s + 96, 128, bar);
  prim::mbar_wait_cluster(bar, 0);
  for (u32 i = 0; i < 8; ++i)
    if (i != 1 && i != 3) out[32 * i + t] = s[32 * i + t];
  // Ordinary stores, published by remote arrivals.
  const u32 more[4] = {in[192 + t], in[224 + t], in[256 + t], in[288 + t]};
  prim::remote_store_x4(s + 256 + 4 * t, next, more);
  prim::mbar_arrive_remote(bar + 1, next);
  prim::mbar_wait_cluster(bar + 1, 0);
  const u32* got = s + 256 + 4 * ((t + 5) % 32);
  out[256 + t] = got[0] + got[1];
  out[288 + t] = got[2] ^ got[3];
  prim::cluster_sync();
#endif
}

KERNEL_FUNCTION(384, 1) register_pool_kernel(Words p) {  // 24 + 240 + 240 of three times 168
#if PRIM_HAS_SM90A
  if (prim::thread_idx().x < 128) {
    prim::set_max_registers_down<24>();
  } else {
    prim::set_max_registers_up<240>();
  }
  prim::atomic_add(p.out + prim::thread_idx().x / 128, 1);
#endif
}

void add(Cases& cases, const char* name, void (*kernel)(Words), const prim::LaunchShape& shape,
         std::size_t in_count, std::size_t out_count) {
  cases.push_back({name, Needs::kSm90a, [=](Dump& dump) {
                     Buffer<u32> in(in_count), out(out_count);
                     for (u32 i = 0; i < in.size(); ++i) in[i] = mixed(i);
                     run(kernel, shape, Words{in.upload(), out.upload()});
                     dump.exact(out.fetch());
                   }});
}

}  // namespace

void add_cluster_cases(Cases& cases) {
  add(cases, "cluster_exchange_2", exchange_kernel, {4, 32, 256, 2}, 4 * 32, 4 * 96);
  add(cases, "cluster_exchange_4", exchange_kernel, {8, 32, 256, 4}, 8 * 32, 8 * 96);
  add(cases, "cluster_exchange_8", exchange_kernel, {16, 32, 256, 8}, 16 * 32, 16 * 96);
  add(cases, "cluster_exit", exit_kernel, {2, 64, 0, 2}, 1, 2);
  add(cases, "cluster_remote", remote_kernel, {4, 32, 4096, 4}, 4 * 512, 4 * 320);
  add(cases, "register_pool_3_groups", register_pool_kernel, {1, 384}, 1, 3);
}

}  // namespace conformance
