// One task is one head of one row of the batch, token by token: its state stays in the cache.
#include "csrc/ops/cpu/gated_linear_attention_params.h"
#include "csrc/ops/cpu/vectors.h"

namespace xlstm::cpu::XLSTM_CPU_CAPABILITY {
namespace {

constexpr int64_t kSegment = 32;  // tokens whose states the backward pass holds at once

/// The rows of one head.
template <class A>
struct Head {
  Head(const GatedLinearAttentionParams& params, int64_t task)
      : p(params), row(task / params.num_heads), head(task % params.num_heads) {}
  int64_t size() const { return p.dk * p.dv; }
  int64_t token(int64_t t) const { return (row * p.time + t) * p.num_heads + head; }
  const A* keys(const void* data, int64_t t) const {
    return static_cast<const A*>(data) + token(t) * p.dk;
  }
  A* keys(void* data, int64_t t) const { return static_cast<A*>(data) + token(t) * p.dk; }
  const A* values(const void* data, int64_t t) const {
    return static_cast<const A*>(data) + token(t) * p.dv;
  }
  A* values(void* data, int64_t t) const { return static_cast<A*>(data) + token(t) * p.dv; }
  const A* bonus() const { return static_cast<const A*>(p.u) + head * p.dk; }
  A* state(void* data) const { return static_cast<A*>(data) + (row * p.num_heads + head) * size(); }
  bool resets(int64_t t) const { return p.reset != nullptr && p.reset[row * p.time + t]; }
  /// e^g of a token.
  void decays(int64_t t, A* out) const {
    const A* g = keys(p.g, t);
    for (int64_t d = 0; d < p.dk; d += kLanes<A>) {
      const int64_t n = smaller(kLanes<A>, p.dk - d);
      store(out + d, exp(load(g + d, n)), n);
    }
  }
  void first_state(A* out) const {
    const A* from = p.state0 == nullptr ? nullptr : state(const_cast<void*>(p.state0));
    for (int64_t i = 0; i < size(); ++i) out[i] = from == nullptr ? A(0) : from[i];
  }
  const GatedLinearAttentionParams& p;
  const int64_t row, head;
};

template <class A>
void clear(A* data, int64_t size) {
  for (int64_t i = 0; i < size; ++i) data[i] = A(0);
}

template <class A>
A dot(const A* a, const A* b, int64_t size) {
  Vec<A> sum(A(0));
  for (int64_t i = 0; i < size; i += kLanes<A>) {
    const int64_t n = smaller(kLanes<A>, size - i);
    sum = at::vec::fmadd(load(a + i, n), load(b + i, n), sum);
  }
  return horizontal_sum<A>(sum);
}

/// Passes over one token. h == nullptr: the state alone. from and to may be the same.
template <class A>
void advance(const Head<A>& head, int64_t t, const A* decay, const A* from, A* to, A* h) {
  const GatedLinearAttentionParams& p = head.p;
  const A *q = head.keys(p.q, t), *k = head.keys(p.k, t), *v = head.values(p.v, t);
  const bool bonus = p.u != nullptr;
  A direct(0);
  if (bonus && h != nullptr)
    for (int64_t d = 0; d < p.dk; ++d) direct += q[d] * head.bonus()[d] * k[d];
  for (int64_t c = 0; c < p.dv; c += kLanes<A>) {
    const int64_t n = smaller(kLanes<A>, p.dv - c);
    const Vec<A> value = load(v + c, n);
    Vec<A> sum = Vec<A>(direct) * value;
    for (int64_t d = 0; d < p.dk; ++d) {
      const Vec<A> old = load(from + d * p.dv + c, n);
      const Vec<A> next = at::vec::fmadd(Vec<A>(decay[d]), old, Vec<A>(k[d]) * value);
      sum = at::vec::fmadd(Vec<A>(q[d]), bonus ? old : next, sum);
      store(to + d * p.dv + c, next, n);
    }
    if (h != nullptr) store(h + c, sum * Vec<A>(A(p.scale)), n);
  }
}

template <class A>
void forward_head(const GatedLinearAttentionParams& p, int64_t task) {
  const Head<A> head(p, task);
  const Scratch<A> decay(p.dk + 1);
  A* state = head.state(p.state);
  head.first_state(state);
  for (int64_t t = 0; t < p.time; ++t) {
    if (head.resets(t)) clear(state, head.size());
    head.decays(t, decay.get());
    advance(head, t, decay.get(), state, state, head.values(p.h, t));
  }
}

/// From the state that entered token t and the gradient of the one that left it: the gradients of the token's arguments,
/// and in place the gradient of the entering state.
template <class A>
void back_over_token(const Head<A>& head, int64_t t, const A* decay, const A* entered, A* dstate,
                     A* du) {
  const GatedLinearAttentionParams& p = head.p;
  const A *q = head.keys(p.q, t), *k = head.keys(p.k, t), *v = head.values(p.v, t),
          *dh = head.values(p.dh, t);
  A *dq = head.keys(p.dq, t), *dk = head.keys(p.d_k, t), *dg = head.keys(p.dg, t),
    *dv = head.values(p.d_v, t);
  const A scale = A(p.scale), vdh = scale * dot(v, dh, p.dv);
  const bool bonus = p.u != nullptr, reset = head.resets(t);
  A direct(0);  // of dh in dv
  clear(dv, p.dv);
  for (int64_t d = 0; d < p.dk; ++d) {
    const A asked = scale * q[d];  // S_t, or with a bonus S_{t-1}, receives asked * dh
    const Vec<A> at_next(bonus ? A(0) : asked), at_old(bonus ? asked : A(0));
    Vec<A> read(A(0)), key(A(0)), gate(A(0));
    for (int64_t c = 0; c < p.dv; c += kLanes<A>) {
      const int64_t n = smaller(kLanes<A>, p.dv - c);
      A* cell = dstate + d * p.dv + c;
      const Vec<A> out = load(dh + c, n), old = load(entered + d * p.dv + c, n);
      const Vec<A> grad = at::vec::fmadd(at_next, out, load(cell, n));
      read = at::vec::fmadd(old, out, read);
      key = at::vec::fmadd(grad, load(v + c, n), key);
      gate = at::vec::fmadd(old, grad, gate);
      store(dv + c, at::vec::fmadd(Vec<A>(k[d]), grad, load(dv + c, n)), n);
      const Vec<A> back = at::vec::fmadd(Vec<A>(decay[d]), grad, at_old * out);
      store(cell, reset ? Vec<A>(A(0)) : back, n);
    }
    const A seen = scale * horizontal_sum<A>(read);
    dk[d] = horizontal_sum<A>(key);
    dg[d] = decay[d] * horizontal_sum<A>(gate);
    if (bonus) {
      const A u = head.bonus()[d];
      dq[d] = seen + u * k[d] * vdh;
      dk[d] += u * q[d] * vdh;
      du[d] += q[d] * k[d] * vdh;
      direct += asked * u * k[d];
    } else {
      dq[d] = decay[d] * seen + k[d] * vdh;
    }
  }
  if (!bonus) return;
  for (int64_t c = 0; c < p.dv; ++c) dv[c] += direct * dh[c];
}

template <class A>
void backward_head(const GatedLinearAttentionParams& p, int64_t task) {
  const Head<A> head(p, task);
  const int64_t size = head.size(), segments = ceil_div(p.time, kSegment);
  const Scratch<A> decay(p.dk + 1), starts((segments + 1) * size + 1),
      states((smaller(kSegment, p.time) + 1) * size + 1);
  // What enters each segment.
  head.first_state(starts.get());
  for (int64_t s = 0; s < segments; ++s) {
    A* next = starts.get() + (s + 1) * size;
    const A* from = starts.get() + s * size;
    for (int64_t t = s * kSegment; t < smaller(p.time, (s + 1) * kSegment); ++t, from = next) {
      head.decays(t, decay.get());
      if (head.resets(t)) clear(next, size), from = next;
      advance<A>(head, t, decay.get(), from, next, nullptr);
    }
  }
  A *dstate = head.state(p.dstate0), *last = head.state(const_cast<void*>(p.dstate));
  for (int64_t i = 0; i < size; ++i) dstate[i] = last[i];
  A* du = p.u == nullptr ? nullptr : static_cast<A*>(p.du) + task * p.dk;
  if (du != nullptr) clear(du, p.dk);
  for (int64_t s = segments - 1; s >= 0; --s) {
    const int64_t begin = s * kSegment, end = smaller(p.time, begin + kSegment);
    for (int64_t i = 0; i < size; ++i) states.get()[i] = starts.get()[s * size + i];
    for (int64_t t = begin; t < end; ++t) {  // each slot: what entered that token
      A* entered = states.get() + (t - begin) * size;
      if (head.resets(t)) clear(entered, size);
      head.decays(t, decay.get());
      advance<A>(head, t, decay.get(), entered, entered + size, nullptr);
    }
    for (int64_t t = end - 1; t >= begin; --t) {
      head.decays(t, decay.get());
      back_over_token(head, t, decay.get(), states.get() + (t - begin) * size, dstate, du);
    }
  }
}

template <class F>
void each_head(const GatedLinearAttentionParams& p, const F& f) {
  at::parallel_for(0, p.batch * p.num_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) f(task);
  });
}

}  // namespace

void gated_linear_attention(const GatedLinearAttentionParams& p) {
  each_head(p, [&](int64_t task) {
    p.dtype == Dtype::kDouble ? forward_head<double>(p, task) : forward_head<float>(p, task);
  });
}
void gated_linear_attention_backward(const GatedLinearAttentionParams& p) {
  each_head(p, [&](int64_t task) {
    p.dtype == Dtype::kDouble ? backward_head<double>(p, task) : backward_head<float>(p, task);
  });
}

}  // namespace xlstm::cpu::XLSTM_CPU_CAPABILITY
