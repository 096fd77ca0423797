// The recurrent pass of one thread's sequences, and its gradient. Compiled once for each instruction set,
// with SIRE_ISA naming it; cpu.cpp picks one at run time. No function of the standard library is instantiated
// here: the linker might serve another instruction set's callers with it.
//
// Originals and variants step together. At step t the rows of a product are the states of the originals and
// of the variants that are inside their span; a variant that starts at t needs no product, since it reads
// another input next to the original's W_hh h[t-1] + b_hh. The gradient runs the same way back: what such a
// variant owes to W_hh h[t-1] is added to the original's before that goes through the two products, with W_hh
// and with the states.
#include "simd.h"
#include "swap_rnn.h"

namespace sire_fast {
namespace {

// Distance of rows of n values in scratch memory: whole cache lines, and an odd number of them, since powers
// of two would put the rows of a panel into the same few sets of the cache.
template <class T>
int64_t stride(int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  return ((n + line - 1) / line | 1) * line;
}

template <class T>
void copy(int64_t n, const T* from, T* to) {
  for (int64_t k = 0; k < n; ++k) to[k] = from[k];
}

template <class T>
void zero(int64_t n, T* to) {
  for (int64_t k = 0; k < n; ++k) to[k] = 0;
}

// Sets "denormals are zero" for the life of the object: they are harmless here and many times slower.
class FlushDenormals {
 public:
#if defined(__SSE__)
  FlushDenormals() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | 0x8040); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FlushDenormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    __asm__ volatile("msr fpcr, %0" : : "r"(before_ | (1 << 24)));
  }
  ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#endif
};

// Calls body(h) for every whole vector of n values and body(h, rest) for what is left.
template <class T, class F>
SIRE_FN void each_vector(int64_t n, F body) {
  int64_t h = 0;
  for (; h + Math<T>::width <= n; h += Math<T>::width) body(h);
  if (h < n) body(h, int(n - h));
}

template <class T>
void add(int64_t n, const T* from, T* to) {
  using M = Math<T>;
  each_vector<T>(n, [&](int64_t k, auto... rest) __attribute__((always_inline)) {
    M::store(to + k, M::load(to + k, rest...) + M::load(from + k, rest...), rest...);
  });
}

// One row's step: x and u are (G*H), s and next (H) each, gates (N*H) or null.
template <class Cell, class T>
void step_row(int64_t H, const T* x, const T* u, const T* const* s, T* const* next, T* gates) {
  using M = Math<T>;
  using V = typename M::V;
  each_vector<T>(H, [&](int64_t h, auto... n) __attribute__((always_inline)) {
    V vx[Cell::gates], vu[Cell::gates], vs[Cell::states], vnext[Cell::states], kept[Cell::saved + 1];
    for (int g = 0; g < Cell::gates; ++g) {
      vx[g] = M::load(x + g * H + h, n...);
      vu[g] = M::load(u + g * H + h, n...);
    }
    for (int k = 0; k < Cell::states; ++k) vs[k] = M::load(s[k] + h, n...);
    Cell::template step<M>(vx, vu, vs, vnext, kept);
    for (int k = 0; k < Cell::states; ++k) M::store(next[k] + h, vnext[k], n...);
    if (gates)
      for (int k = 0; k < Cell::saved; ++k) M::store(gates + k * H + h, kept[k], n...);
  });
}

// Its gradient: dx (G*H), unless null, is written, or with add_dx added to; du (G*H) and ds are written, or
// with Add added to. ds may be dnext.
template <class Cell, bool Add, class T>
void step_backward_row(int64_t H, const T* const* dnext, const T* const* s, const T* const* next,
                       const T* gates, T* dx, bool add_dx, T* du, T* const* ds) {
  using M = Math<T>;
  using V = typename M::V;
  each_vector<T>(H, [&](int64_t h, auto... n) __attribute__((always_inline)) {
    V vdnext[Cell::states], vs[Cell::states], vnext[Cell::states], kept[Cell::saved + 1];
    V vdx[Cell::gates], vdu[Cell::gates], vds[Cell::states];
    for (int k = 0; k < Cell::states; ++k) {
      vdnext[k] = M::load(dnext[k] + h, n...);
      vs[k] = M::load(s[k] + h, n...);
      vnext[k] = M::load(next[k] + h, n...);
    }
    for (int k = 0; k < Cell::saved; ++k) kept[k] = M::load(gates + k * H + h, n...);
    Cell::template step_backward<M>(vdnext, vs, vnext, kept, vdx, vdu, vds);
    for (int g = 0; g < Cell::gates; ++g) {
      T* to = du + g * H + h;
      M::store(to, Add ? M::load(to, n...) + vdu[g] : vdu[g], n...);
      if (T* to = dx + g * H + h; dx) M::store(to, add_dx ? M::load(to, n...) + vdx[g] : vdx[g], n...);
    }
    for (int k = 0; k < Cell::states; ++k)
      M::store(ds[k] + h, Add ? M::load(ds[k] + h, n...) + vds[k] : vds[k], n...);
  });
}

template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

// Rows of values for the steps t of sequences b, of all steps (-1) or of the last few, whose numbers differ
// in the bits of `steps`.
template <class T>
struct Rows {
  T* p;
  int64_t per_step, per_sequence, first;  // sequence
  int64_t steps = -1;
  T* operator()(int64_t t, int64_t b) const {
    return p + (t & steps) * per_step + (b - first) * per_sequence;
  }
};

// Where things lie; Call is Forward<T> or Backward<T>, and Value what its pointers to states, gates and spans
// are to.
template <class Cell, class T, class Call, class Value>
struct Layout {
  const Call& call;
  const Schedule& schedule;
  int64_t B = call.size.B, K = call.size.K, H = call.size.H;
  int64_t kept = call.recompute ? 0 : Cell::saved * H;  // gates of a step

  int64_t i(int64_t v) const { return call.swaps.swaps[2 * v]; }
  int64_t j(int64_t v) const { return call.swaps.swaps[2 * v + 1]; }
  int64_t end(int64_t v) const { return call.swaps.ends[v]; }
  int64_t sequence(int64_t v) const { return v / K; }

  // the step whose input variant v reads at step t
  int64_t source(int64_t v, int64_t t) const { return t == i(v) ? j(v) : t == j(v) ? i(v) : t; }

  // states of sequence b before step t
  void before(int64_t b, int64_t t, const T** s) const {
    for (int k = 0; k < Cell::states; ++k)
      s[k] = t ? call.states[k] + ((t - 1) * B + b) * H : call.start[k] + b * H;
  }

  // states and gates of sequence b after step t
  Value* after(int64_t b, int64_t t, Value** s) const {
    for (int k = 0; k < Cell::states; ++k) s[k] = call.states[k] + (t * B + b) * H;
    return call.gates + (t * B + b) * kept;
  }

  // states and gates of variant v after step t of its span
  Value* span(int64_t v, int64_t t, Value** s) const {
    Value* row = call.spans + (schedule.first_row[v] + t - i(v)) * (Cell::states * H + kept);
    for (int k = 0; k < Cell::states; ++k) s[k] = row + k * H;
    return row + Cell::states * H;
  }
};

template <class Cell, class T, class P>
struct Pass {
  using M = Math<T>;
  using Word = typename P::Word;
  using In = Inputs<T>;
  using ForwardLayout = Layout<Cell, T, Forward<T>, T>;
  using BackwardLayout = Layout<Cell, T, Backward<T>, const T>;
  static constexpr int G = Cell::gates, S = Cell::states;

  // ---------------------------------------------------------------- weights and inputs

  // Both weights, packed one behind the other: of the forward, h W_hh' and x W_ih', or, transposed, of the
  // backward, du W_hh and dx W_ih.
  struct Weights {
    int64_t hh, ih;  // values
    Columns<Word> w_hh, w_ih;
    int64_t values() const { return hh + ih; }
  };

  static Weights weights(const Sizes& z, bool transposed, const T* packed) {
    const int64_t width = G * z.H;
    const auto values = [&](int64_t n) {
      return transposed ? packed_words<T, P>(width, n) : packed_words<T, P>(n, width);
    };
    const auto columns = [&](int64_t n, const T* at) {
      return packed_columns<T, P>(reinterpret_cast<const Word*>(at), transposed ? width : n);
    };
    const int64_t hh = values(z.H), ih = z.I ? values(z.I) : 0;
    return {hh, ih, columns(z.H, packed), columns(z.I, packed + hh)};
  }

  static void pack_weights(const In& in, bool transposed, int part, int parts, T* packed) {
    const int64_t width = G * in.size.H;
    const auto one = [&](const T* w, int64_t n, T* to) {
      if (transposed)
        pack<T, P>(part, parts, w, n, 1, width, n, reinterpret_cast<Word*>(to));
      else
        pack<T, P>(part, parts, w, 1, n, n, width, reinterpret_cast<Word*>(to));
    };
    one(in.w_hh, in.size.H, packed);
    if (in.size.I) one(in.w_ih, in.size.I, packed + weights(in.size, transposed, packed).hh);
  }

  // Space for the rows of a panel as words, of n values each.
  static int64_t row_words(int64_t n) { return P::converts ? kTileRows * stride<T>(n) : 0; }

  static void pad(int64_t n, const T* bias, T* to) {
    zero(stride<T>(n), to);
    if (bias) copy(n, bias, to);
  }

  // Rows that are collected before they are multiplied: enough for whole panels, and for the sums of dW, all
  // of which is read and written each time, but few enough to stay in the cache.
  static constexpr int64_t kCollected = 128;

  // Steps whose inputs are projected together; a power of two.
  static int64_t together(const Share& share) {
    int64_t steps = 1;
    while (steps * (share.end - share.begin) < kCollected) steps *= 2;
    return steps;
  }

  // Steps of which projected inputs, or their gradients, are held: all, or the least power of two that has
  // room for what a step reads, share.reach steps to either side, and for what is projected together.
  static int64_t held(const Share& share) {
    int64_t steps = together(share);
    while (steps < together(share) + 2 * share.reach) steps *= 2;
    return steps < share.steps ? steps : share.steps;
  }

  static int64_t projected_values(const Sizes& z, const Share& share) {
    return z.I ? held(share) * (share.end - share.begin) * stride<T>(G * z.H) : 0;
  }

  static Rows<T> projected_rows(const Sizes& z, const Share& share, T* p) {
    const int64_t width = stride<T>(G * z.H), steps = held(share);
    return {p, (share.end - share.begin) * width, width, share.begin, steps < share.steps ? steps - 1 : -1};
  }

  // Calls body(n, t, b) for panels of n steps t[r] of sequences b[r], from `first` to before `last`, that are
  // inside their sequences.
  template <class F>
  static void each_input_panel(const In& in, const Share& share, int64_t first, int64_t last, F body) {
    int64_t steps[kTileRows], sequences[kTileRows];
    int n = 0;
    for (int64_t t = first; t < last; ++t)
      for (int64_t b = share.begin; b < share.end; ++b) {
        if (t >= in.swaps.lengths[b]) continue;
        steps[n] = t;
        sequences[n] = b;
        if (++n < kTileRows) continue;
        body(n, steps, sequences);
        n = 0;
      }
    if (n) body(n, steps, sequences);
  }

  // The inputs as the gates read them: x itself, or where the weights are given W_ih x + b_ih, projected when
  // they are needed.
  class Projection {
   public:
    // `start` is the first step that is asked for; values, bias and words are memory to work in
    Projection(const In& in, const Share& share, const Columns<Word>& w_ih, int64_t start, T* values, T* bias,
               Word* words)
        : in_(in), share_(share), w_ih_(w_ih), bias_(bias), words_(words), begin_(start), end_(start) {
      const int64_t width = G * in.size.H;
      rows_ = in.size.I ? projected_rows(in.size, share, values)
                        : Rows<T>{const_cast<T*>(in.x), in.size.B * width, width, 0};
      if (in.size.I) pad(width, in.b_ih, bias);
    }

    // From now on, what a step t reads is there.
    void need(int64_t t) {
      if (!in_.size.I) return;
      const int64_t steps = together(share_), last = t + share_.reach + 1, first = t - share_.reach;
      for (; end_ < share_.steps && end_ < last; end_ = (end_ / steps + 1) * steps) project(end_);
      for (; begin_ > 0 && begin_ > first; begin_ = (begin_ - 1) / steps * steps)
        project((begin_ - 1) / steps * steps);
    }

    const T* operator()(int64_t t, int64_t b) const { return rows_(t, b); }

   private:
    // the steps that are projected together from this one on
    void project(int64_t first) {
      const int64_t B = in_.size.B, I = in_.size.I, last = first + together(share_);
      each_input_panel(in_, share_, first, last < share_.steps ? last : share_.steps,
                       [&](int n, const int64_t* t, const int64_t* b) {
                         Panel<T, P> panel;
                         for (int r = 0; r < n; ++r)
                           panel.add(P::row(I, in_.x + (t[r] * B + b[r]) * I, words_ + r * stride<T>(I)),
                                     bias_, rows_(t[r], b[r]));
                         panel.multiply(vectors<T>(G * in_.size.H), P::words(I), 1, w_ih_);
                       });
    }

    const In& in_;
    const Share& share_;
    Columns<Word> w_ih_;
    T* bias_;
    Word* words_;
    Rows<T> rows_;
    int64_t begin_, end_;
  };

  // ---------------------------------------------------------------- forward

  static int64_t forward_packed(const Forward<T>& f) { return weights(f.size, false, nullptr).values(); }

  static void pack_forward(const Forward<T>& f, int part, int parts, T* packed) {
    pack_weights(f, false, part, parts, packed);
  }

  static Workspace forward_workspace(const Forward<T>& f, const Share& share) {
    const Sizes& z = f.size;
    return {
        (2 + kTileRows) * stride<T>(G * z.H) + row_words(z.H > z.I ? z.H : z.I) + projected_values(z, share),
        0, share.end - share.begin + share.rows};
  }

  static void forward(const Forward<T>& f, const Share& share, const T* packed, const Scratch<T>& scratch) {
    const FlushDenormals guard;
    const ForwardLayout at{f, share.schedule};
    const int64_t H = at.H, I = f.size.I, width = stride<T>(G * H);
    const Weights w = weights(f.size, false, packed);
    T* bias = scratch.values;
    T* u = bias + 2 * width;  // (kTileRows, G*H)
    Word* words = reinterpret_cast<Word*>(u + kTileRows * width);
    T* projected = u + kTileRows * width + row_words(H > I ? H : I);
    Projection x(f, share, w.w_ih, 0, projected, bias + width, words);
    int64_t* sequences = scratch.numbers;
    int64_t* running = sequences + (share.end - share.begin);
    int64_t n_running = 0;
    pad(G * H, f.b_hh, bias);

    for (int64_t t = 0; t < share.steps; ++t) {
      x.need(t);
      int64_t n_sequences = 0;
      for (int64_t b = share.begin; b < share.end; ++b)
        if (t < f.swaps.lengths[b]) sequences[n_sequences++] = b;
      int64_t starting = share.schedule.start_begin[t];
      const int64_t start_end = share.schedule.start_begin[t + 1];

      each_panel(n_sequences + n_running, [&](int64_t first, int count) {
        Panel<T, P> panel;
        const T* s[kTileRows][S];
        for (int r = 0; r < count; ++r) {
          const int64_t row = first + r;
          const T* input;
          if (row < n_sequences) {
            at.before(sequences[row], t, s[r]);
            input = x(t, sequences[row]);
          } else {
            const int64_t v = running[row - n_sequences];
            variant_after(at, v, t - 1, const_cast<T**>(s[r]));
            input = x(at.source(v, t), at.sequence(v));
          }
          panel.add(P::row(H, s[r][0], words + r * stride<T>(H)), bias, u + r * width, input);
        }
        panel.multiply(vectors<T>(G * H), P::words(H), 1, w.w_hh);

        for (int r = 0; r < count; ++r) {
          T* next[S];
          if (first + r >= n_sequences) {
            T* gates = variant_after(at, running[first + r - n_sequences], t, next);
            step_row<Cell>(H, panel.soon[r], panel.out[r], s[r], next, gates);
            continue;
          }
          const int64_t b = sequences[first + r];
          T* gates = at.after(b, t, next);
          step_row<Cell>(H, panel.soon[r], panel.out[r], s[r], next, at.kept && f.train ? gates : nullptr);
          for (; starting < start_end && at.sequence(share.schedule.by_start[starting]) == b; ++starting) {
            const int64_t v = share.schedule.by_start[starting];
            gates = variant_after(at, v, t, next);
            step_row<Cell>(H, x(at.j(v), b), panel.out[r], s[r], next, gates);
          }
        }
      });

      for (int64_t e = share.schedule.end_begin[t]; e < share.schedule.end_begin[t + 1]; ++e)
        finish(at, share.schedule.by_end[e], t);
      int64_t kept = 0;
      for (int64_t r = 0; r < n_running; ++r)
        if (at.end(running[r]) > t) running[kept++] = running[r];
      n_running = kept;
      for (int64_t n = share.schedule.start_begin[t]; n < start_end; ++n)
        running[n_running++] = share.schedule.by_start[n];
    }

    for (int64_t b = share.begin; b < share.end; ++b) {
      const int64_t length = f.swaps.lengths[b];
      T* s[S];
      at.after(b, length - 1, s);
      for (int k = 0; k < S; ++k) copy(H, s[k], f.last[k] + b * H);
      for (int64_t t = length; t < f.size.T; ++t) {
        T* gates = at.after(b, t, s);
        for (int k = 0; k < S; ++k) zero(H, s[k]);
        if (f.train) zero(at.kept, gates);
      }
    }
  }

  // Where variant v's states and gates go at step t: into its span, or in inference into its result, over and
  // over. Returns null if no gates are kept.
  static T* variant_after(const ForwardLayout& at, int64_t v, int64_t t, T** s) {
    if (at.call.train) {
      T* gates = at.span(v, t, s);
      return at.kept ? gates : nullptr;
    }
    for (int k = 0; k < S; ++k) s[k] = at.call.variants[k] + v * at.H;
    return nullptr;
  }

  // The result of variant v, whose end is t.
  static void finish(const ForwardLayout& at, int64_t v, int64_t t) {
    const Forward<T>& f = at.call;
    const int64_t H = at.H;
    T* original[S];
    T* from[S];
    at.after(at.sequence(v), t, original);
    if (at.i(v) == at.j(v))
      at.after(at.sequence(v), t, from);
    else
      variant_after(at, v, t, from);
    for (int k = 0; k < S; ++k) copy(H, from[k], f.variants[k] + v * H);
    typename M::V total{};
    each_vector<T>(H, [&](int64_t h, auto... n) __attribute__((always_inline)) {
      const auto d = M::load(f.variants[0] + v * H + h, n...) - M::load(original[0] + h, n...);
      total += d * d;
    });
    f.penalty[v] = M::sum(total);
  }

  // ---------------------------------------------------------------- backward

  // Sums over the steps of a share: of dW, (G*H, n) in rows of stride(n), and of db behind it.
  struct Sums {
    T* dw;
    int64_t n, stride_n, width, stride_width;
    T* db() const { return dw + width * stride_n; }
    int64_t values() const { return width * stride_n + stride_width; }
  };

  static Sums sums(const Sizes& z, int64_t n, T* at) {
    return {at, n, stride<T>(n), G * z.H, stride<T>(G * z.H)};
  }

  static int64_t backward_packed(const Backward<T>& g) {
    return weights(g.size, true, nullptr).values() +
           (g.recompute ? weights(g.size, false, nullptr).values() : 0);
  }

  static void pack_backward(const Backward<T>& g, int part, int parts, T* packed) {
    pack_weights(g, true, part, parts, packed);
    if (g.recompute) pack_weights(g, false, part, parts, packed + weights(g.size, true, packed).values());
  }

  // Rows that are collected before they are added to dW. No step has more than half as many: its originals
  // and its running variants are at most share.rows each.
  static int64_t collected(const Share& share) {
    return 2 * share.rows > kCollected ? 2 * share.rows : kCollected;
  }

  // Where a share's scratch memory goes in the backward.
  struct Space {
    Sums hh, ih;  // first: reduce() reads them
    T *ds_sequences, *ds_slots, *du, *before, *inputs, *dx_row, *again, *bias, *dx_proj, *projected;
    Word* words;
    int64_t values, zeroed;
    Space(const Backward<T>& g, const Share& share, T* p) {
      const Sizes& z = g.size;
      const int64_t n = share.end - share.begin, width = stride<T>(G * z.H), states = S * stride<T>(z.H),
                    i_stride = z.I ? stride<T>(z.I) : 0, widest = stride<T>(z.H > z.I ? z.H : z.I);
      T* at = p;
      const auto take = [&](int64_t count) {
        T* const here = at;
        at += count;
        return here;
      };
      hh = sums(z, z.H, take(sums(z, z.H, p).values()));
      ih = sums(z, z.I, take(z.I ? sums(z, z.I, p).values() : 0));
      ds_sequences = take(n * states);       // (sequences, S, H)
      ds_slots = take(share.rows * states);  // (rows, S, H), one for each running variant
      before = take(collected(share) * stride<T>(z.H));
      inputs = take((collected(share) + 1) * i_stride);  // and a row that stays zero
      zeroed = at - p;
      du = take(collected(share) * width);
      dx_row = take(kTileRows * i_stride);
      words = reinterpret_cast<Word*>(
          take(P::converts ? collected(share) / 2 * (width + widest) + row_words(G * z.H) : 0));
      // recomputed: W_hh h + b_hh of all rows of a step, and one row of states and gates
      again = take(g.recompute ? share.rows * width + (S + Cell::saved) * stride<T>(z.H) : 0);
      bias = take(2 * width);
      dx_proj = take(projected_values(z, share));
      projected = take(g.recompute ? projected_values(z, share) : 0);
      values = at - p;
    }
  };

  static Workspace backward_workspace(const Backward<T>& g, const Share& share) {
    const int64_t sequences = share.end - share.begin;
    return {Space(g, share, nullptr).values, 2 * share.rows,
            sequences + 3 * share.rows + (g.size.I ? held(share) : share.steps) * sequences};
  }

  static void backward(const Backward<T>& g, const Share& share, const T* packed, const Scratch<T>& scratch) {
    const FlushDenormals guard;
    const BackwardLayout at{g, share.schedule};
    const int64_t B = at.B, H = at.H, n_shared = share.end - share.begin;
    const int64_t h_stride = stride<T>(H), u_stride = stride<T>(G * H), state_stride = S * h_stride;
    const Weights w = weights(g.size, true, packed);
    const Space space(g, share, scratch.values);
    zero(space.zeroed, scratch.values);

    T** ds_rows = scratch.pointers;
    int64_t* row_of = scratch.numbers;  // sequence -> its row of du at this step
    int64_t* running = row_of + n_shared;
    int64_t* slot_of = running + share.rows;
    int64_t* free_slots = slot_of + share.rows;
    int64_t* written = free_slots + share.rows;  // as rows of dx_proj: have they a value?
    int64_t n_running = 0, n_free = share.rows, n_collected = 0;
    for (int64_t n = 0; n < share.rows; ++n) free_slots[n] = n;

    const bool projects = g.size.I, wants_dx = g.dx || g.dw_ih || g.db_ih;
    const Rows<T> dx_proj =
        projects ? projected_rows(g.size, share, space.dx_proj) : Rows<T>{g.dx, B * G * H, G * H, 0};
    const Rows<int64_t> has_value{written, n_shared, 1, share.begin, dx_proj.steps};
    for (int64_t n = 0; n < (projects ? held(share) : share.steps) * n_shared; ++n) written[n] = 0;
    int64_t n_projected = share.steps;  // first step whose inputs' gradients have gone on to x and W_ih
    Again again(g, at, share, packed, space);

    for (int64_t t = share.steps - 1; t >= 0; --t) {
      const int64_t ending = share.schedule.end_begin[t + 1] - share.schedule.end_begin[t];
      if (n_collected + n_shared + n_running + ending > collected(share)) {
        add_products(space.hh, n_collected, space.du, space.before, space.words);
        n_collected = 0;
      }
      T* const du_now = space.du + n_collected * u_stride;
      T* const h_now = space.before + n_collected * h_stride;
      int64_t rows = 0;

      for (int64_t b = share.begin; b < share.end; ++b) {
        if (t >= g.swaps.lengths[b]) continue;
        const bool last = t == g.swaps.lengths[b] - 1;
        row_of[b - share.begin] = rows++;
        for (int k = 0; k < S; ++k) {
          T* ds = space.ds_sequences + (b - share.begin) * state_stride + k * h_stride;
          if (g.d_states[k]) add(H, g.d_states[k] + (t * B + b) * H, ds);
          if (last && g.d_last[k]) add(H, g.d_last[k] + b * H, ds);
        }
      }
      for (int64_t e = share.schedule.end_begin[t]; e < share.schedule.end_begin[t + 1]; ++e) {
        const int64_t v = share.schedule.by_end[e];
        T* ds = space.ds_sequences + (at.sequence(v) - share.begin) * state_stride;
        if (at.i(v) < at.j(v)) {
          running[n_running] = v;
          slot_of[n_running] = free_slots[--n_free];
          start_variant(at, v, t, ds, space.ds_slots + slot_of[n_running++] * state_stride);
        } else {
          for (int k = 0; k < S; ++k)
            if (g.d_variants[k]) add(H, g.d_variants[k] + v * H, ds + k * h_stride);
        }
      }
      if (g.recompute) again.products(t, running, n_running);

      // the gradient of one row's step, which read the input of step `source`
      const auto step_backward = [&](auto adds, int64_t source, int64_t b, int64_t row, const T* const* s,
                                     const T* const* next, const T* gates, T* const* ds_next, T* du,
                                     T* const* ds) {
        step_backward_row<Cell, decltype(adds)::value>(
            H, ds_next, s, next, g.recompute ? again.gates(source, b, row, s) : gates,
            wants_dx ? dx_proj(source, b) : nullptr, *has_value(source, b), du, ds);
        *has_value(source, b) = true;
      };
      const T* s[S];
      const T* next[S];
      T* ds[S];
      for (int64_t b = share.begin; b < share.end; ++b) {
        if (t >= g.swaps.lengths[b]) continue;
        const int64_t row = row_of[b - share.begin];
        for (int k = 0; k < S; ++k)
          ds[k] = space.ds_sequences + (b - share.begin) * state_stride + k * h_stride;
        at.before(b, t, s);
        const T* gates = at.after(b, t, next);
        step_backward(Constant<false>{}, t, b, row, s, next, gates, ds, du_now + row * u_stride, ds);
        copy(H, s[0], h_now + row * h_stride);
        ds_rows[row] = ds[0];
      }
      int64_t kept = 0;
      for (int64_t r = 0; r < n_running; ++r) {
        const int64_t v = running[r], b = at.sequence(v), slot = slot_of[r], source = at.source(v, t);
        T* slot_ds[S];
        for (int k = 0; k < S; ++k) slot_ds[k] = space.ds_slots + slot * state_stride + k * h_stride;
        const T* gates = at.span(v, t, next);
        if (t == at.i(v)) {
          // the span ends here: what is left goes to the original, from whose state the variant started
          const int64_t row = row_of[b - share.begin];
          for (int k = 0; k < S; ++k)
            ds[k] = space.ds_sequences + (b - share.begin) * state_stride + k * h_stride;
          at.before(b, t, s);
          step_backward(Constant<true>{}, source, b, row, s, next, gates, slot_ds, du_now + row * u_stride,
                        ds);
          free_slots[n_free++] = slot;
        } else {
          at.span(v, t - 1, s);
          step_backward(Constant<false>{}, source, b, rows, s, next, gates, slot_ds, du_now + rows * u_stride,
                        slot_ds);
          copy(H, s[0], h_now + rows * h_stride);
          ds_rows[rows++] = slot_ds[0];
          running[kept] = v;
          slot_of[kept++] = slot;
        }
      }
      n_running = kept;

      each_panel(rows, [&](int64_t first, int count) {
        Panel<T, P> panel;
        for (int r = 0; r < count; ++r) {
          T* ds_row = ds_rows[first + r];
          panel.add(P::row(G * H, du_now + (first + r) * u_stride, space.words + r * u_stride), ds_row,
                    ds_row);
        }
        panel.multiply(vectors<T>(H), P::words(G * H), 1, w.w_hh);
      });
      n_collected += rows;

      // no step before t reads the inputs of t + share.reach or of one behind it
      for (int64_t first; projects && n_projected > 0; n_projected = first) {
        first = (n_projected - 1) / together(share) * together(share);
        if (t > 0 && first < t + share.reach) break;
        if (wants_dx) project_backward(g, share, w.w_ih, dx_proj, first, n_projected, space);
        for (int64_t s = first; s < n_projected; ++s)
          for (int64_t b = share.begin; b < share.end; ++b) *has_value(s, b) = false;
      }
    }
    add_products(space.hh, n_collected, space.du, space.before, space.words);

    const int64_t features = projects ? g.size.I : G * H;
    for (int64_t b = share.begin; g.dx && b < share.end; ++b)
      for (int64_t t = g.swaps.lengths[b]; t < g.size.T; ++t) zero(features, g.dx + (t * B + b) * features);
    for (int k = 0; k < S; ++k)
      if (g.d_start[k])
        for (int64_t n = 0; n < n_shared; ++n)
          copy(H, space.ds_sequences + n * state_stride + k * h_stride, g.d_start[k] + (share.begin + n) * H);
  }

  // Computes again, in the backward, the gates that the forward has not kept.
  struct Again {
    const Backward<T>& g;
    const BackwardLayout& at;
    const Share& share;
    const Space& space;
    Weights w;
    Projection x;

    Again(const Backward<T>& g, const BackwardLayout& at, const Share& share, const T* packed,
          const Space& space)
        : g(g),
          at(at),
          share(share),
          space(space),
          w(weights(g.size, false, packed + weights(g.size, true, packed).values())),
          x(g, share, w.w_ih, share.steps, space.projected, space.bias + stride<T>(G * g.size.H),
            space.words) {
      pad(G * g.size.H, g.b_hh, space.bias);
    }

    // W_hh h + b_hh of the step's rows: the originals and those running variants that started before
    void products(int64_t t, const int64_t* running, int64_t n_running) {
      x.need(t);
      const int64_t H = at.H, u_stride = stride<T>(G * H);
      Panel<T, P> panel;
      int64_t row = 0;
      const auto flush = [&] {
        panel.multiply(vectors<T>(G * H), P::words(H), 1, w.w_hh);
        panel.n = 0;
      };
      const auto push = [&](const T* state) {
        const Word* h = P::row(H, state, space.words + panel.n * stride<T>(H));
        panel.add(h, space.bias, space.again + row++ * u_stride);
        if (panel.n == kTileRows) flush();
      };
      const T* s[S];
      for (int64_t b = share.begin; b < share.end; ++b) {
        if (t >= g.swaps.lengths[b]) continue;
        at.before(b, t, s);
        push(s[0]);
      }
      for (int64_t r = 0; r < n_running; ++r) {
        if (t == at.i(running[r])) continue;
        at.span(running[r], t - 1, s);
        push(s[0]);
      }
      if (panel.n) flush();
    }

    // the gates of a row whose states before the step are s; good until the next call
    const T* gates(int64_t source, int64_t b, int64_t row, const T* const* s) const {
      const int64_t H = at.H, u_stride = stride<T>(G * H);
      T* const gates = space.again + share.rows * u_stride;
      T* next[S];
      for (int k = 0; k < S; ++k) next[k] = gates + (Cell::saved + k) * H;
      step_row<Cell>(H, x(source, b), space.again + row * u_stride, s, next, gates);
      return gates;
    }
  };

  // The gradient of variant v at its end t, into its own states, (S, H), and for the penalty into the
  // original's.
  static void start_variant(const BackwardLayout& at, int64_t v, int64_t t, T* ds_original, T* ds_variant) {
    const Backward<T>& g = at.call;
    const int64_t H = at.H;
    for (int k = 0; k < S; ++k) {
      T* ds = ds_variant + k * stride<T>(H);
      zero(stride<T>(H), ds);
      if (g.d_variants[k]) copy(H, g.d_variants[k] + v * H, ds);
    }
    if (!g.d_penalty) return;
    const T* variant[S];
    const T* original[S];
    at.span(v, t, variant);
    at.after(at.sequence(v), t, original);
    const T twice = 2 * g.d_penalty[v];
    for (int64_t h = 0; h < H; ++h) {
      const T d = twice * (variant[0][h] - original[0][h]);
      ds_variant[h] += d;
      ds_original[h] -= d;
    }
  }

  // dW += du' right and db += du, over n rows: du (n, G*H) and right (n, sums.n).
  static void add_products(const Sums& sums, int64_t n, const T* du, const T* right, Word* words) {
    const Word* left = P::rows(n, sums.stride_width, du, words);
    const Columns<Word> columns{P::rows(n, sums.stride_n, right, words + P::words(n) * sums.stride_width),
                                M::width, sums.stride_n};
    each_panel(sums.width, [&](int64_t first, int count) {
      Panel<T, P> panel;
      for (int r = 0; r < count; ++r) {
        T* row = sums.dw + (first + r) * sums.stride_n;
        panel.add(left + first + r, row, row);
      }
      panel.multiply(vectors<T>(sums.n), P::words(n), sums.stride_width, columns);
    });
    for (int64_t r = 0; r < sums.stride_width; r += M::width) {
      typename M::V sum{};  // of these rows first: added one by one to a large total they would lose digits
      for (int64_t m = 0; m < n; ++m) sum += M::load(du + m * sums.stride_width + r);
      M::store(sums.db() + r, M::load(sums.db() + r) + sum);
    }
  }

  // From the gradient of the projected inputs of the steps from `begin` to before `end`, which lie behind
  // each other, to those of the inputs, W_ih and b_ih.
  static void project_backward(const Backward<T>& g, const Share& share, const Columns<Word>& w_ih,
                               const Rows<T>& dx_proj, int64_t begin, int64_t end, const Space& space) {
    const int64_t B = g.size.B, I = g.size.I, width = G * g.size.H, i_stride = stride<T>(I);
    const int64_t n_shared = share.end - share.begin, n_rows = (end - begin) * n_shared;
    for (int64_t first = 0; (g.dw_ih || g.db_ih) && first < n_rows; first += collected(share)) {
      const int64_t n = n_rows - first < collected(share) ? n_rows - first : collected(share);
      for (int64_t r = 0; r < n; ++r) {
        const int64_t t = begin + (first + r) / n_shared, b = share.begin + (first + r) % n_shared;
        // not from beyond the sequence: what padding holds might be no number
        const bool inside = t < g.swaps.lengths[b];
        copy(I, inside ? g.x + (t * B + b) * I : space.inputs + collected(share) * i_stride,
             space.inputs + r * i_stride);
        if (!inside) zero(width, dx_proj(t, b));
      }
      const T* dx = dx_proj(begin, share.begin) + first * dx_proj.per_sequence;
      add_products(space.ih, n, dx, space.inputs, space.words);
    }
    if (!g.dx) return;
    const T* none = space.inputs + collected(share) * i_stride;
    each_input_panel(g, share, begin, end, [&](int n, const int64_t* t, const int64_t* b) {
      Panel<T, P> panel;
      for (int r = 0; r < n; ++r)
        panel.add(P::row(width, dx_proj(t[r], b[r]), space.words + r * stride<T>(width)), none,
                  space.dx_row + r * i_stride);
      panel.multiply(vectors<T>(I), P::words(width), 1, w_ih);
      for (int r = 0; r < n; ++r) copy(I, panel.out[r], g.dx + (t[r] * B + b[r]) * I);
    });
  }

  static void reduce(const Backward<T>& g, const T* const* shares, int n_shares, int part, int parts) {
    const int64_t width = G * g.size.H;
    // in the order of the shares: the same bits every time
    const auto total = [&](const T* first_share_part, int64_t n, T* to) {
      if (!to) return;
      const int64_t offset = first_share_part - shares[0];
      copy(n, shares[0] + offset, to);
      for (int k = 1; k < n_shares; ++k) add(n, shares[k] + offset, to);
    };
    const Sums hh = sums(g.size, g.size.H, const_cast<T*>(shares[0]));
    const Sums ih = sums(g.size, g.size.I, hh.dw + hh.values());
    for (int64_t r = width * part / parts; r < width * (part + 1) / parts; ++r) {
      total(hh.dw + r * hh.stride_n, hh.n, g.dw_hh ? g.dw_hh + r * hh.n : nullptr);
      total(ih.dw + r * ih.stride_n, ih.n, g.dw_ih ? g.dw_ih + r * ih.n : nullptr);
    }
    if (part) return;
    total(hh.db(), width, g.db_hh);
    total(ih.db(), width, g.db_ih);
  }

  static constexpr Kernels<T> kernels() {
    return {Cell::saved,
            {forward_packed, pack_forward, forward_workspace, forward},
            {backward_packed, pack_backward, backward_workspace, backward},
            reduce};
  }
};

}  // namespace

#define SIRE_CELLS(...)                                                          \
  {Pass<RnnTanh, __VA_ARGS__>::kernels(), Pass<RnnRelu, __VA_ARGS__>::kernels(), \
   Pass<Gru, __VA_ARGS__>::kernels(), Pass<Lstm, __VA_ARGS__>::kernels()}

// Addresses, and nothing that has to run first: no machine may run what is compiled for another.
#ifdef __AVX512BF16__
const Kernels<float> kBf16[kCells] = SIRE_CELLS(float, Product<float, true>);
const InstructionSet kAvx512Bf16 = {"Avx512Bf16", kAvx512F32, kAvx512F64, kBf16};
#else
#define SIRE_QUOTE(x) #x
#define SIRE_NAME(isa) SIRE_QUOTE(isa)
#define SIRE_JOIN(a, b, c) a##b##c
#define SIRE_SET(isa, dtype) SIRE_JOIN(k, isa, dtype)
const Kernels<float> SIRE_SET(SIRE_ISA, F32)[kCells] = SIRE_CELLS(float, Product<float>);
const Kernels<double> SIRE_SET(SIRE_ISA, F64)[kCells] = SIRE_CELLS(double, Product<double>);
const InstructionSet SIRE_SET(SIRE_ISA, ) = {SIRE_NAME(SIRE_ISA), SIRE_SET(SIRE_ISA, F32),
                                             SIRE_SET(SIRE_ISA, F64), SIRE_SET(SIRE_ISA, F32)};
#endif

}  // namespace sire_fast
