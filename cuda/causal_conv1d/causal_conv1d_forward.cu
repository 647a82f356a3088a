// Forward: y over strips of tokens, then the final states.
#include "cuda/causal_conv1d/causal_conv1d_launch.h"
#include "cuda/causal_conv1d/causal_conv1d_plan.h"

namespace xlstm::cuda {
namespace {

constexpr int kTileBytes = 8 * 1024, kStateThreads = 256;
constexpr int kBlocksOfMultiprocessor = 8;
constexpr int64_t kManyBlocks = 128 * kBlocksOfMultiprocessor;

struct ForwardLaunch {
  ConvForwardParams call;
  ConvStrips strips;
  bool x_vector = false, y_vector = false;
};

template <class T, int kTaps>
struct ForwardShared {
  static constexpr int kRows = kTileBytes / ConvShape<T, kTaps>::kRowBytes;
  struct Stage {
    ConvTile<T, kTaps, kRows> tile;  ///< x, then y
    ConvToken tokens[kRows];
    bool plain;  ///< all rows are there and see kTaps inputs, none of them a start
  } stages[2];
};

template <class T, int kTaps>
class ForwardBlock {
 public:
  using Shared = ForwardShared<T, kTaps>;
  static constexpr int kOwn = ConvShape<T, kTaps>::kOwn;

  DEVICE_FUNCTION ForwardBlock(const ForwardLaunch& launch, Shared& shared)
      : l(launch),
        in(launch.call.in),
        s(shared),
        at(in, launch.strips, ConvShape<T, kTaps>::kChannels),
        thread(static_cast<int>(prim::thread_idx().x)),
        window(in, at.batch, at.channel + thread * kOwn) {}

  DEVICE_FUNCTION void run() {
    load(at.begin, 0);
    int stage = 0;
#pragma unroll 1
    for (int32_t first = at.begin; first < at.end; first += Shared::kRows, stage ^= 1) {
      prim::cp_async_wait<0>();
      prim::sync_block();
      load(first + Shared::kRows, stage ^ 1);
      if (window.channel < in.parameters.channels) walk(first, stage);
      prim::sync_block();
      s.stages[stage].tile.store(l.call.y, l.y_vector, at.batch, first, 0, rows_from(first),
                                 at.channel, in.parameters.channels);
    }
  }

 private:
  DEVICE_FUNCTION int rows_from(int32_t first) const {
    return at.end - first < Shared::kRows ? at.end - first : Shared::kRows;
  }

  DEVICE_FUNCTION void load(int32_t first, int stage) {
    const int rows = rows_from(first);
    if (rows <= 0) return;
    typename Shared::Stage& to = s.stages[stage];
    to.tile.load(in.x, l.x_vector, at.batch, first, rows, at.channel, in.parameters.channels);
    prim::cp_async_commit();
    conv_tile_tokens(in, at.batch, first, rows, to.tokens, to.plain,
                     [](const ConvToken& token) { return token.seen == kTaps && !token.starts; });
  }

  DEVICE_FUNCTION void walk(int32_t first, int stage) {
    typename Shared::Stage& tile = s.stages[stage];
    if (kTaps == 4 && tile.plain) {
      if (first == at.begin) window.fill(first);
      return walk_plain(tile);
    }
    const int rows = rows_from(first);
    int row = 0;
#pragma unroll 1
    while (row < rows) {
      if (first + row == at.begin || tile.tokens[row].starts) window.fill(first + row);
#pragma unroll 1
      do {
        step(tile, row, tile.tokens[row].seen);
        ++row;
      } while (row < rows && !tile.tokens[row].starts);
    }
  }

  /// Nothing to ask of any token, and a window that moves by renaming registers.
  DEVICE_FUNCTION void walk_plain(typename Shared::Stage& tile) {
#pragma unroll kTaps
    for (int row = 0; row < Shared::kRows; ++row) step(tile, row, kTaps);
  }

  /// A token that sees so many inputs: x becomes y.
  DEVICE_FUNCTION void step(typename Shared::Stage& tile, int row, int seen) {
    ConvOwn<T, kOwn>& own = tile.tile.own(row, thread);
    window.push(own);
    ConvOwn<T, kOwn> y;
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      from_float(y.v[i], conv_activate<T>(window.convolved(i, seen), in.parameters.silu));
    own = y;
  }

  const ForwardLaunch& l;
  const ConvInputs& in;
  Shared& s;
  const ConvPlace at;
  const int thread;
  ConvWindow<T, kTaps> window;
};

template <class T, int kTaps>
KERNEL_FUNCTION(kConvThreads, kBlocksOfMultiprocessor)
causal_conv1d_rows(const GRID_CONSTANT ForwardLaunch l) {
  using Shared = ForwardShared<T, kTaps>;
  ForwardBlock<T, kTaps>(l, *reinterpret_cast<Shared*>(prim::dynamic_shared())).run();
}

/// The last W-1 inputs of every sequence: a thread per number of the states.
template <class T>
KERNEL_FUNCTION(kStateThreads, 4)
causal_conv1d_last(const GRID_CONSTANT ConvForwardParams p) {
  const ConvInputs& in = p.in;
  const int32_t memory = in.parameters.width - 1, channels = in.parameters.channels;
  const int64_t number = int64_t{prim::block_idx().x} * kStateThreads + prim::thread_idx().x;
  if (number >= int64_t{in.num_sequences} * memory * channels) return;
  const int32_t channel = static_cast<int32_t>(number % channels);
  const int32_t row = static_cast<int32_t>(number / channels % memory);
  const ConvSequence s = conv_sequence_at(in, static_cast<int32_t>(number / channels / memory));
  const int32_t batch = conv_row_of(in, s), token = s.end - memory + row;
  const int32_t after = token + 1 > s.begin ? token + 1 : s.begin;
  const float value = conv_resets_between(in, batch, after, s.end)
                          ? 0.0F
                          : conv_input<T>(in, batch, s, token, channel);
  const int64_t to = s.index * p.state.batch + row * p.state.time + channel * p.state.channel;
  from_float(static_cast<T*>(p.state.data)[to], value);
}

template <class T, int kTaps>
void launch_rows(ForwardLaunch& l, Stream stream) {
  l.strips = plan_conv_strips(l.call.in, ConvShape<T, kTaps>::kChannels, kManyBlocks);
  prim::launch("causal_conv1d_rows", causal_conv1d_rows<T, kTaps>,
               {static_cast<u32>(l.strips.count * l.strips.tiles), kConvThreads,
                sizeof(ForwardShared<T, kTaps>)},
               l, stream);
}

}  // namespace

void causal_conv1d_forward(const ConvForwardParams& params, Stream stream) {
  const ConvInputs& in = params.in;
  const int32_t channels = in.parameters.channels;
  ForwardLaunch l;
  l.call = params;
  l.x_vector = conv_is_vector(in.x, channels, in.dtype);
  l.y_vector = conv_is_vector(params.y, channels, in.dtype);
  const int64_t numbers = int64_t{in.num_sequences} * (in.parameters.width - 1) * channels;
  const u32 blocks = static_cast<u32>((numbers + kStateThreads - 1) / kStateThreads);
  visit_dtype(in.dtype, [&](auto zero) {
    using T = decltype(zero);
    conv_is_narrow(in) ? launch_rows<T, 4>(l, stream) : launch_rows<T, 8>(l, stream);
    prim::launch("causal_conv1d_last", causal_conv1d_last<T>, {blocks, kStateThreads}, params,
                 stream);
  });
}

}  // namespace xlstm::cuda
