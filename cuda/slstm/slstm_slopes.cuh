#pragma once
// The slopes of all steps in memory, as the backward kernel reads them: four float32 numbers, and four that only scale
// gradients in 16 bits each where one plane holds a number, else in float32. The largest error counts for a tanh near 0,
// which is why z is a float16.
#include "cuda/slstm/slstm_block.cuh"
#include "cuda/slstm/slstm_gates.cuh"

namespace xlstm::cuda {

struct alignas(8) Bytes8 {
  u32 words[2];
};
template <int kPlanes>
struct SlstmNarrow {
  using Type = Bytes8;
};
template <>
struct SlstmNarrow<2> {
  using Type = Bytes16;
};

/// Slopes of a unit at a token; not yet numbers, so that nothing waits for a load.
template <int kPlanes>
struct PackedSlopes {
  Bytes16 wide;
  typename SlstmNarrow<kPlanes>::Type narrow;
};

/// Of the token's unit in (B,T,NH,DH).
template <int kPlanes>
DEVICE_FUNCTION PackedSlopes<kPlanes> load_slopes(const SlstmSlopesView& slopes, int64_t at) {
  using Narrow = typename SlstmNarrow<kPlanes>::Type;
  return {reinterpret_cast<const Bytes16*>(slopes.wide)[at],
          reinterpret_cast<const Narrow*>(slopes.narrow)[at]};
}

/// A reset before the token: nothing goes back beyond it.
DEVICE_FUNCTION bool is_cut(const CellSlopes& s) { return s.forget < 0; }

/// kStates: slstm_kept_states of the cell.
template <int kStates, int kPlanes>
DEVICE_FUNCTION void store_slopes(const SlstmSlopesView& slopes, int64_t at, const CellSlopes& s,
                                  bool cut) {
  using Narrow = typename SlstmNarrow<kPlanes>::Type;
  const float second = kStates == 3 ? s.f_n : s.candidate;
  reinterpret_cast<Bytes16*>(slopes.wide)[at] = {{prim::bits_of(s.f_c), prim::bits_of(second),
                                                  prim::bits_of(cut ? -1.0F : s.forget),
                                                  prim::bits_of(s.hidden)}};
  Narrow narrow;
  if constexpr (kPlanes == 1) {
    narrow.words[0] = prim::pack_bf16x2(s.y, s.i);
    narrow.words[1] = prim::float_to_f16(s.z) | static_cast<u32>(prim::float_to_bf16(s.o)) << 16;
  } else {
    narrow = {{prim::bits_of(s.y), prim::bits_of(s.i), prim::bits_of(s.z), prim::bits_of(s.o)}};
  }
  reinterpret_cast<Narrow*>(slopes.narrow)[at] = narrow;
}

template <int kStates, int kPlanes>
DEVICE_FUNCTION CellSlopes unpack_slopes(const PackedSlopes<kPlanes>& packed) {
  CellSlopes s;
  const u32(&wide)[4] = packed.wide.words;
  const auto& narrow = packed.narrow.words;
  s.f_c = prim::float_of(wide[0]), s.forget = prim::float_of(wide[2]);
  if constexpr (kPlanes == 1) {
    s.y = prim::float_of(narrow[0] << 16), s.i = prim::float_of(narrow[0] & 0xffff0000U);
    s.z = prim::f16_to_float(static_cast<u16>(narrow[1]));
    s.o = prim::float_of(narrow[1] & 0xffff0000U);
  } else {
    s.y = prim::float_of(narrow[0]), s.i = prim::float_of(narrow[1]);
    s.z = prim::float_of(narrow[2]), s.o = prim::float_of(narrow[3]);
  }
  if constexpr (kStates == 3) {
    s.f_n = prim::float_of(wide[1]), s.hidden = prim::float_of(wide[3]);
    s.candidate = s.i * (1.0F - s.z * s.z);
  } else {
    s.f_n = s.hidden = 0;
    s.candidate = prim::float_of(wide[1]);
  }
  return s;
}

}  // namespace xlstm::cuda
