#pragma once
// How the kernels of the causal convolution walk along the tokens: a block owns a run of tokens (a strip) and some
// channels and takes them tile by tile through shared memory, one tile being on its way while every thread walks down its
// own channels of another with the window in registers. What a token sees is the same for all channels and is worked out
// once per tile.
#include "cuda/causal_conv1d/causal_conv1d_params.h"
#include "cuda/numbers.cuh"

namespace xlstm::cuda {

constexpr int kConvThreads = 128;

/// kTaps: 4 for widths 2 to 4, 8 beyond. A thread's channels lie side by side in one word.
template <class T, int kTaps>
struct ConvShape {
  static constexpr int kOwn = kTaps == 4 && sizeof(T) == 2 ? 2 : 1;
  static constexpr int kChannels = kConvThreads * kOwn;
  static constexpr int kRowBytes = kChannels * static_cast<int>(sizeof(T));
  static constexpr int kPieces = kRowBytes / 16;  ///< of a row
};

/// The strips of a launch, and which tensors may be moved 16 bytes at a time.
struct ConvStrips {
  int32_t tokens = 1;   ///< of a strip
  int32_t per_row = 0;  ///< strips of a batch row
  int32_t tiles = 1;    ///< of channels
  int64_t count = 0;    ///< strips
};

/// What happens at a token.
struct alignas(8) ConvToken {
  uint8_t seen;   ///< inputs that it sees, its own included; 0: there is no such token
  uint8_t reach;  ///< how many of these are tokens: the others lie in the start state
  bool starts;    ///< the window becomes the start state
  int8_t kept;    ///< its row in the final state, or -1
  int32_t sequence;
};

struct ConvSequence {
  int32_t index, begin, end;
};

/// The sequence that a token of a batch row belongs to.
DEVICE_FUNCTION ConvSequence conv_sequence_of(const ConvInputs& in, int32_t batch, int32_t token) {
  if (in.cu_seqlens == nullptr) return {batch, 0, in.time};
  int32_t low = 0, high = in.num_sequences;
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    (in.cu_seqlens[middle] <= token ? low : high) = middle;
  }
  return {low, in.cu_seqlens[low], in.cu_seqlens[low + 1]};
}
DEVICE_FUNCTION ConvSequence conv_sequence_at(const ConvInputs& in, int32_t index) {
  if (in.cu_seqlens == nullptr) return {index, 0, in.time};
  return {index, in.cu_seqlens[index], in.cu_seqlens[index + 1]};
}
DEVICE_FUNCTION int32_t conv_row_of(const ConvInputs& in, const ConvSequence& sequence) {
  return in.cu_seqlens == nullptr ? sequence.index : 0;
}

DEVICE_FUNCTION bool conv_reset_at(const ConvInputs& in, int32_t batch, int32_t token) {
  return in.reset != nullptr && in.reset[batch * in.reset_batch + token * in.reset_time];
}

/// Whether a reset lies in tokens [begin, end).
DEVICE_FUNCTION bool conv_resets_between(const ConvInputs& in, int32_t batch, int32_t begin,
                                         int32_t end) {
  if (in.reset == nullptr) return false;
  for (int32_t token = begin; token < end; ++token)
    if (conv_reset_at(in, batch, token)) return true;
  return false;
}

DEVICE_FUNCTION ConvToken conv_token(const ConvInputs& in, int32_t batch, int32_t token) {
  if (token >= in.time) return {0, 0, false, -1, 0};
  const ConvSequence s = conv_sequence_of(in, batch, token);
  const int32_t width = in.parameters.width;
  const bool start_state = in.state0.data != nullptr;
  int32_t seen = 1;
  while (seen < width && (token - seen >= s.begin || start_state) &&
         !(token - seen + 1 >= s.begin && conv_reset_at(in, batch, token - seen + 1)))
    ++seen;
  const int32_t tokens = token - s.begin + 1, row = token - (s.end - (width - 1));
  const bool kept = row >= 0 && !conv_resets_between(in, batch, token + 1, s.end);
  return {static_cast<uint8_t>(seen), static_cast<uint8_t>(seen < tokens ? seen : tokens),
          start_state && tokens == 1, static_cast<int8_t>(kept ? row : -1), s.index};
}

/// The input at a token, or before the sequence's begin in its start state (0 without one).
template <class T>
DEVICE_FUNCTION float conv_input(const ConvInputs& in, int32_t batch, const ConvSequence& s,
                                 int32_t token, int32_t channel) {
  if (token >= s.begin) {
    const ConvView& x = in.x;
    return to_float(
        static_cast<const T*>(x.data)[batch * x.batch + token * x.time + channel * x.channel]);
  }
  const int32_t row = in.parameters.width - 1 + token - s.begin;
  const ConvView& state = in.state0;
  if (state.data == nullptr || row < 0) return 0;
  return to_float(static_cast<const T*>(
      state.data)[s.index * state.batch + row * state.time + channel * state.channel]);
}

/// The weight of the input `distance` tokens back, 0 beyond the width.
DEVICE_FUNCTION float conv_weight(const ConvParameters& p, int32_t channel, int distance) {
  if (distance >= p.width) return 0;
  const int64_t at = channel * p.weight_channel + (p.width - 1 - distance) * p.weight_tap;
  return load_number(p.weight, at, p.weight_dtype);
}
DEVICE_FUNCTION float conv_bias(const ConvParameters& p, int32_t channel) {
  return p.bias == nullptr ? 0.0F : load_number(p.bias, channel * p.bias_channel, p.bias_dtype);
}

/// For results of type T: 16 bits do not tell expf from the machine's exponential.
template <class T>
DEVICE_FUNCTION float conv_sigmoid(float x) {
  constexpr float kLog2e = 1.44269504F;
  return prim::rcp(1.0F + (sizeof(T) == 2 ? prim::ex2(-kLog2e * x) : expf(-x)));
}
template <class T>
DEVICE_FUNCTION float conv_activate(float a, bool silu) {
  return silu ? a * conv_sigmoid<T>(a) : a;
}
/// The slope of the activation.
template <class T>
DEVICE_FUNCTION float conv_slope(float a, bool silu) {
  if (!silu) return 1;
  const float s = conv_sigmoid<T>(a);
  return s * (1.0F + a * (1.0F - s));
}

/// Works out the tokens of a tile's rows, and whether all are there and plain. The first warp.
template <int kRows, class F>
DEVICE_FUNCTION void conv_tile_tokens(const ConvInputs& in, int32_t batch, int32_t first, int rows,
                                      ConvToken (&tokens)[kRows], bool& plain, const F& is_plain) {
  static_assert(kRows <= 32);
  const int lane = static_cast<int>(prim::thread_idx().x);
  if (lane >= 32) return;
  bool own = lane >= kRows;
  if (lane < rows) {
    const ConvToken token = conv_token(in, batch, first + lane);
    tokens[lane] = token;
    own = is_plain(token);
  }
  const bool all = prim::ballot(own) == ~0U;
  if (lane == 0) plain = all;
}

/// A thread's channels of one token, read and written as one word.
template <class T, int kOwn>
struct alignas(kOwn * sizeof(T)) ConvOwn {
  T v[kOwn];
};

/// Weights, bias and window of a thread's channels, the first being `channel`.
template <class T, int kTaps>
class ConvWindow {
 public:
  using Shape = ConvShape<T, kTaps>;
  static constexpr int kOwn = Shape::kOwn;

  DEVICE_FUNCTION ConvWindow(const ConvInputs& inputs, int32_t row, int32_t first_channel)
      : in(inputs), batch(row), channel(first_channel) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const bool there = channel + i < in.parameters.channels;
      bias[i] = there ? conv_bias(in.parameters, channel + i) : 0.0F;
#pragma unroll
      for (int j = 0; j < kTaps; ++j)
        weight[j][i] = there ? conv_weight(in.parameters, channel + i, j) : 0.0F;
    }
  }

  /// The inputs before a token.
  DEVICE_FUNCTION void fill(int32_t token) {
    const ConvSequence s = conv_sequence_of(in, batch, token);
#pragma unroll 1
    for (int j = 1; j < kTaps; ++j) {
#pragma unroll
      for (int k = kTaps - 1; k > 0; --k)
#pragma unroll
        for (int i = 0; i < kOwn; ++i) x[k][i] = x[k - 1][i];
      const int32_t from = token - kTaps + j;
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
        x[0][i] = channel + i < in.parameters.channels
                      ? conv_input<T>(in, batch, s, from, channel + i)
                      : 0.0F;
    }
  }

  /// A new token's input: x[j] is the one j tokens back from now on.
  DEVICE_FUNCTION void push(const ConvOwn<T, kOwn>& own) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int j = kTaps - 1; j > 0; --j) x[j][i] = x[j - 1][i];
      x[0][i] = to_float(own.v[i]);
    }
  }

  DEVICE_FUNCTION float convolved(int i, int seen) const {
    float sum = bias[i];
#pragma unroll
    for (int j = kTaps - 1; j >= 0; --j)
      if (j < seen) sum += weight[j][i] * x[j][i];
    return sum;
  }

  const ConvInputs& in;
  const int32_t batch, channel;
  float weight[kTaps][kOwn], bias[kOwn];
  float x[kTaps][kOwn];
};

/// Which part of a launch a block does.
struct ConvPlace {
  int32_t batch, begin, end;  ///< tokens of the strip
  int32_t strip, channel;     ///< first channel of the tile
  DEVICE_FUNCTION ConvPlace(const ConvInputs& in, const ConvStrips& strips, int32_t channels) {
    const int32_t block = static_cast<int32_t>(prim::block_idx().x);
    strip = block / strips.tiles;
    channel = block % strips.tiles * channels;
    batch = strip / strips.per_row;
    begin = strip % strips.per_row * strips.tokens;
    end = begin + strips.tokens < in.time ? begin + strips.tokens : in.time;
  }
};

/// Moves rows of a tile from and to global memory; a thread always meets the same places of the tile.
template <class T, int kTaps, int kRows>
struct ConvTile {
  using Shape = ConvShape<T, kTaps>;
  static constexpr int kPieceNumbers = 16 / static_cast<int>(sizeof(T));
  static constexpr int kStep = kConvThreads / Shape::kPieces;  ///< rows that a pass moves
  static_assert(kConvThreads % Shape::kPieces == 0);
  alignas(16) T numbers[kRows][Shape::kChannels];

  /// Row r becomes token first + r, for r < rows. The caller commits and waits.
  DEVICE_FUNCTION void load(const ConvView& x, bool vector, int32_t batch, int32_t first, int rows,
                            int32_t channel, int32_t channels) {
    const int thread = static_cast<int>(prim::thread_idx().x);
    const T* from = static_cast<const T*>(x.data) + batch * x.batch + first * x.time;
    if (vector) {
      const int row = thread / Shape::kPieces, at = thread % Shape::kPieces * kPieceNumbers;
      if (channel + at >= channels) return;
      from += row * x.time + channel + at;
#pragma unroll 2
      for (int done = row; done < rows; done += kStep, from += kStep * x.time)
        prim::cp_async16(&numbers[done][at], from);
      return;
    }
#pragma unroll 1
    for (int at = thread; at < Shape::kChannels; at += kConvThreads) {
      if (channel + at < channels) {
        const T* number = from + (channel + at) * x.channel;
#pragma unroll 2
        for (int row = 0; row < rows; ++row, number += x.time) numbers[row][at] = *number;
      } else {
        for (int row = 0; row < rows; ++row) from_float(numbers[row][at], 0);
      }
    }
  }

  /// Rows [low, rows) become tokens first + r.
  DEVICE_FUNCTION void store(const ConvView& y, bool vector, int32_t batch, int32_t first, int low,
                             int rows, int32_t channel, int32_t channels) const {
    const int thread = static_cast<int>(prim::thread_idx().x);
    T* to = static_cast<T*>(y.data) + batch * y.batch + first * y.time;
    if (vector) {
      const int row = thread / Shape::kPieces, at = thread % Shape::kPieces * kPieceNumbers;
      if (channel + at >= channels) return;
      to += row * y.time + channel + at;
#pragma unroll 2
      for (int done = row; done < rows; done += kStep, to += kStep * y.time)
        if (done >= low)
          *reinterpret_cast<Bytes16*>(to) = *reinterpret_cast<const Bytes16*>(&numbers[done][at]);
      return;
    }
#pragma unroll 1
    for (int at = thread; at < Shape::kChannels && channel + at < channels; at += kConvThreads) {
      T* number = to + (channel + at) * y.channel;
#pragma unroll 1
      for (int row = 0; row < rows; ++row, number += y.time)
        if (row >= low) *number = numbers[row][at];
    }
  }

  DEVICE_FUNCTION ConvOwn<T, Shape::kOwn>& own(int row, int thread) {
    return *reinterpret_cast<ConvOwn<T, Shape::kOwn>*>(&numbers[row][thread * Shape::kOwn]);
  }
};

}  // namespace xlstm::cuda
