// Backward: dx and partial sums of the parameters' gradients over strips of tokens, then those sums and the gradient of
// the start states.
#include "cuda/causal_conv1d/causal_conv1d_launch.h"
#include "cuda/causal_conv1d/causal_conv1d_plan.h"
#include "cuda/column_sums.h"

namespace xlstm::cuda {
namespace {

constexpr int kTileBytes = 6 * 1024, kStateThreads = 256;
constexpr int kBlocksOfMultiprocessor = 6;  // as many as registers allow without spills
constexpr int64_t kManyBlocks = 128 * kBlocksOfMultiprocessor;

struct BackwardLaunch {
  ConvBackwardParams call;
  ConvStrips strips;
  bool x_vector = false, dy_vector = false, dx_vector = false;
};

template <class T, int kTaps>
struct BackwardShared {
  static constexpr int kRows = kTileBytes / ConvShape<T, kTaps>::kRowBytes;
  struct Stage {
    ConvTile<T, kTaps, kRows> x, dy;  ///< row r of dy then holds dx, kTaps - 1 tokens earlier
    ConvToken tokens[kRows];
    bool plain;  ///< all rows are there, see kTaps tokens, belong to the strip and are not kept
  } stages[2];
};

/// A token's d goes to its own dx and to those of the inputs before it: dx is complete kTaps - 1 tokens later. So a strip
/// goes on for that many tokens, whose own dx and parameters' gradients belong to the next strip.
template <class T, int kTaps>
class BackwardBlock {
 public:
  using Shared = BackwardShared<T, kTaps>;
  static constexpr int kOwn = ConvShape<T, kTaps>::kOwn;

  DEVICE_FUNCTION BackwardBlock(const BackwardLaunch& launch, Shared& shared)
      : l(launch),
        in(launch.call.in),
        s(shared),
        at(in, launch.strips, ConvShape<T, kTaps>::kChannels),
        end(at.end + kTaps - 1),
        thread(static_cast<int>(prim::thread_idx().x)),
        window(in, at.batch, at.channel + thread * kOwn) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      dbias[i] = 0;
#pragma unroll
      for (int j = 0; j < kTaps; ++j) dx[j][i] = dweight[j][i] = 0;
    }
  }

  DEVICE_FUNCTION void run() {
    load(at.begin, 0);
    int stage = 0;
#pragma unroll 1
    for (int32_t first = at.begin; first < end; first += Shared::kRows, stage ^= 1) {
      prim::cp_async_wait<0>();
      prim::sync_block();
      load(first + Shared::kRows, stage ^ 1);
      if (window.channel < in.parameters.channels) walk(first, stage);
      prim::sync_block();
      const int32_t to = first - (kTaps - 1);  // token of row 0
      s.stages[stage].dy.store(l.call.dx, l.dx_vector, at.batch, to,
                               to < at.begin ? at.begin - to : 0, rows_from(first, end), at.channel,
                               in.parameters.channels);
    }
    leave_sums();
  }

 private:
  static DEVICE_FUNCTION int rows_from(int32_t first, int32_t last) {
    return last - first < Shared::kRows ? last - first : Shared::kRows;
  }

  DEVICE_FUNCTION void load(int32_t first, int stage) {
    typename Shared::Stage& to = s.stages[stage];
    const int rows = rows_from(first, end < in.time ? end : in.time);
    const int32_t channels = in.parameters.channels;
    if (rows > 0) {
      to.x.load(in.x, l.x_vector, at.batch, first, rows, at.channel, channels);
      if (l.call.dy.data != nullptr)
        to.dy.load(l.call.dy, l.dy_vector, at.batch, first, rows, at.channel, channels);
      prim::cp_async_commit();
    }
    conv_tile_tokens(in, at.batch, first, rows_from(first, end), to.tokens, to.plain,
                     [&](const ConvToken& token) {
                       return token.reach == kTaps &&
                              (token.kept < 0 || l.call.dstate.data == nullptr);
                     });
  }

  DEVICE_FUNCTION void walk(int32_t first, int stage) {
    typename Shared::Stage& tile = s.stages[stage];
    if (kTaps == 4 && tile.plain && first + Shared::kRows <= at.end && l.call.dy.data != nullptr) {
      if (first == at.begin) window.fill(first);
      return walk_plain(tile);
    }
    const int rows = rows_from(first, end);
    int row = 0;
#pragma unroll 1
    while (row < rows) {
      if (first + row == at.begin || tile.tokens[row].starts) window.fill(first + row);
#pragma unroll 1
      do {
        step(tile, row, tile.tokens[row], first + row < at.end, l.call.dy.data != nullptr);
        ++row;
      } while (row < rows && !tile.tokens[row].starts);
    }
  }

  /// Nothing to ask of any token, and windows that move by renaming registers.
  DEVICE_FUNCTION void walk_plain(typename Shared::Stage& tile) {
#pragma unroll kTaps
    for (int row = 0; row < Shared::kRows; ++row)
      step(tile, row, {kTaps, kTaps, false, -1, 0}, true, true);
  }

  /// A token, which lies in the strip or not: dy becomes dx of kTaps - 1 tokens earlier.
  DEVICE_FUNCTION void step(typename Shared::Stage& tile, int row, ConvToken token, bool owned,
                            bool has_dy) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int j = kTaps - 1; j > 0; --j) dx[j][i] = dx[j - 1][i];
      dx[0][i] = 0;
    }
    if (token.kept >= 0 && l.call.dstate.data != nullptr) add_state_gradient(token);
    if (token.seen > 0) {
      window.push(tile.x.own(row, thread));
      if (has_dy) add_token(token, owned, tile.dy.own(row, thread));
    }
    ConvOwn<T, kOwn> out;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) from_float(out.v[i], dx[kTaps - 1][i]);
    tile.dy.own(row, thread) = out;
  }

  DEVICE_FUNCTION void add_state_gradient(const ConvToken& token) {
    const ConvView& state = l.call.dstate;
    const int64_t from = token.sequence * state.batch + token.kept * state.time;
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (window.channel + i < in.parameters.channels)
        dx[0][i] = to_float(
            static_cast<const T*>(state.data)[from + (window.channel + i) * state.channel]);
  }

  /// `owned`: the token lies in the strip. dy: a copy, read as one word.
  DEVICE_FUNCTION void add_token(const ConvToken& token, bool owned, ConvOwn<T, kOwn> dy) {
    const int counted = owned ? token.seen : 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float d = to_float(dy.v[i]);
      if (in.parameters.silu) d *= conv_slope<T>(window.convolved(i, token.seen), true);
      if (owned) dbias[i] += d;
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        if (j < token.reach) dx[j][i] += window.weight[j][i] * d;
        if (j < counted) dweight[j][i] += d * window.x[j][i];
      }
    }
  }

  /// partials: [strip][W taps by distance, then the bias][C]
  DEVICE_FUNCTION void leave_sums() const {
    const int32_t channels = in.parameters.channels, width = in.parameters.width;
    float* to = l.call.partials + int64_t{at.strip} * (width + 1) * channels + window.channel;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (window.channel + i >= channels) continue;
#pragma unroll
      for (int j = 0; j < kTaps; ++j)
        if (j < width) to[j * channels + i] = dweight[j][i];
      to[width * channels + i] = dbias[i];
    }
  }

  const BackwardLaunch& l;
  const ConvInputs& in;
  Shared& s;
  const ConvPlace at;
  const int32_t end;
  const int thread;
  ConvWindow<T, kTaps> window;
  float dx[kTaps][kOwn];  ///< dx[j] is that of j tokens back
  float dweight[kTaps][kOwn], dbias[kOwn];
};

template <class T, int kTaps>
KERNEL_FUNCTION(kConvThreads, kBlocksOfMultiprocessor)
causal_conv1d_gradients(const GRID_CONSTANT BackwardLaunch l) {
  using Shared = BackwardShared<T, kTaps>;
  BackwardBlock<T, kTaps>(l, *reinterpret_cast<Shared*>(prim::dynamic_shared())).run();
}

/// dstate0: a thread per number; its few tokens are convolved once more.
template <class T>
KERNEL_FUNCTION(kStateThreads, 4)
causal_conv1d_first(const GRID_CONSTANT ConvBackwardParams p) {
  const ConvInputs& in = p.in;
  const ConvParameters& parameters = in.parameters;
  const int32_t memory = parameters.width - 1, channels = parameters.channels;
  const int64_t number = int64_t{prim::block_idx().x} * kStateThreads + prim::thread_idx().x;
  if (number >= int64_t{in.num_sequences} * memory * channels) return;
  const int32_t channel = static_cast<int32_t>(number % channels);
  const int32_t row = static_cast<int32_t>(number / channels % memory);
  const ConvSequence s = conv_sequence_at(in, static_cast<int32_t>(number / channels / memory));
  const int32_t batch = conv_row_of(in, s), length = s.end - s.begin;
  const auto offset = [&](const ConvView& x, int64_t b, int64_t t) {
    return b * x.batch + t * x.time + channel * x.channel;
  };
  float sum = 0;
  const int32_t kept = row - length;  // its row in the final state
  if (p.dstate.data != nullptr && kept >= 0 && !conv_resets_between(in, batch, s.begin, s.end))
    sum = to_float(static_cast<const T*>(p.dstate.data)[offset(p.dstate, s.index, kept)]);
  for (int32_t i = 0; p.dy.data != nullptr && i <= row && i < length; ++i) {
    const int32_t token = s.begin + i;
    if (conv_reset_at(in, batch, token)) break;
    float d = to_float(static_cast<const T*>(p.dy.data)[offset(p.dy, batch, token)]);
    if (parameters.silu) {
      float a = conv_bias(parameters, channel);
      for (int32_t j = memory; j >= 0; --j)
        a += conv_weight(parameters, channel, j) * conv_input<T>(in, batch, s, token - j, channel);
      d *= conv_slope<T>(a, true);
    }
    sum += conv_weight(parameters, channel, i + memory - row) * d;
  }
  from_float(static_cast<T*>(p.dstate0.data)[offset(p.dstate0, s.index, row)], sum);
}

template <class T, int kTaps>
void launch_gradients(const ConvBackwardParams& params, Stream stream) {
  const int32_t channels = params.in.parameters.channels;
  BackwardLaunch l;
  l.call = params;
  l.strips = plan_conv_strips(params.in, ConvShape<T, kTaps>::kChannels, kManyBlocks);
  l.x_vector = conv_is_vector(params.in.x, channels, params.in.dtype);
  l.dy_vector = conv_is_vector(params.dy, channels, params.in.dtype);
  l.dx_vector = conv_is_vector(params.dx, channels, params.in.dtype);
  prim::launch("causal_conv1d_gradients", causal_conv1d_gradients<T, kTaps>,
               {static_cast<u32>(l.strips.count * l.strips.tiles), kConvThreads,
                sizeof(BackwardShared<T, kTaps>)},
               l, stream);
}

int64_t strips_of(const ConvInputs& in) {
  int64_t count = 0;
  visit_dtype(in.dtype, [&](auto zero) {
    using T = decltype(zero);
    count = plan_conv_strips(
                in, conv_is_narrow(in) ? ConvShape<T, 4>::kChannels : ConvShape<T, 8>::kChannels,
                kManyBlocks)
                .count;
  });
  return count;
}

ColumnSums parameter_sums(const ConvBackwardParams& p) {
  const ConvParameters& parameters = p.in.parameters;
  const int64_t channels = parameters.channels, width = parameters.width;
  ColumnSums sums;
  sums.rows = p.partials;
  sums.count = strips_of(p.in);
  sums.pitch = (width + 1) * channels;
  for (int64_t j = 0; j < width; ++j) {
    void* out = static_cast<char*>(p.dweight) + (width - 1 - j) * bytes_of(parameters.weight_dtype);
    sums.add({j * channels, channels, out, width, parameters.weight_dtype});
  }
  if (p.dbias != nullptr) sums.add({width * channels, channels, p.dbias, 1, parameters.bias_dtype});
  return sums;
}

}  // namespace

int64_t causal_conv1d_partials(const ConvInputs& in) {
  return strips_of(in) * (in.parameters.width + 1) * in.parameters.channels;
}

void causal_conv1d_backward(const ConvBackwardParams& params, Stream stream) {
  const ConvInputs& in = params.in;
  const int64_t numbers =
      int64_t{in.num_sequences} * (in.parameters.width - 1) * in.parameters.channels;
  const u32 blocks = static_cast<u32>((numbers + kStateThreads - 1) / kStateThreads);
  visit_dtype(in.dtype, [&](auto zero) {
    using T = decltype(zero);
    conv_is_narrow(in) ? launch_gradients<T, 4>(params, stream)
                       : launch_gradients<T, 8>(params, stream);
    if (params.dstate0.data != nullptr)
      prim::launch("causal_conv1d_first", causal_conv1d_first<T>, {blocks, kStateThreads}, params,
                   stream);
  });
  launch_column_sums(parameter_sums(params), stream);
}

}  // namespace xlstm::cuda
