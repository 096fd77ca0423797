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

template <class T>
void add(int64_t n, const T* from, T* to) {
  for (int64_t k = 0; k < n; ++k) to[k] += from[k];
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

// Its gradient: dx (G*H) is added to, unless null; du (G*H) and ds are written, or with Add added to. ds may
// be dnext.
template <class Cell, bool Add, class T>
void step_backward_row(int64_t H, const T* const* dnext, const T* const* s, const T* const* next,
                       const T* gates, T* dx, T* du, T* const* ds) {
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
      if (dx) M::store(dx + g * H + h, M::load(dx + g * H + h, n...) + vdx[g], n...);
    }
    for (int k = 0; k < Cell::states; ++k)
      M::store(ds[k] + h, Add ? M::load(ds[k] + h, n...) + vds[k] : vds[k], n...);
  });
}

// Where things lie; P is Forward<T> or Backward<T>, and Value what its pointers to states, gates and spans
// are to.
template <class Cell, class T, class P, class Value>
struct Layout {
  const P& p;
  const Schedule& schedule;
  int64_t B = p.size.B, K = p.size.K, H = p.size.H;

  int64_t i(int64_t v) const { return p.swaps.swaps[2 * v]; }
  int64_t j(int64_t v) const { return p.swaps.swaps[2 * v + 1]; }
  int64_t end(int64_t v) const { return p.swaps.ends[v]; }
  int64_t sequence(int64_t v) const { return v / K; }

  // the step whose input variant v reads at step t
  int64_t source(int64_t v, int64_t t) const { return t == i(v) ? j(v) : t == j(v) ? i(v) : t; }

  // states of sequence b before step t
  void before(int64_t b, int64_t t, const T** s) const {
    for (int k = 0; k < Cell::states; ++k)
      s[k] = t ? p.states[k] + ((t - 1) * B + b) * H : p.start[k] + b * H;
  }

  // states and gates of sequence b after step t
  Value* after(int64_t b, int64_t t, Value** s) const {
    for (int k = 0; k < Cell::states; ++k) s[k] = p.states[k] + (t * B + b) * H;
    return p.gates + (t * B + b) * Cell::saved * H;
  }

  // states and gates of variant v after step t of its span
  Value* span(int64_t v, int64_t t, Value** s) const {
    Value* row = p.spans + (schedule.first_row[v] + t - i(v)) * (Cell::states + Cell::saved) * H;
    for (int k = 0; k < Cell::states; ++k) s[k] = row + k * H;
    return row + Cell::states * H;
  }
};

template <class Cell, class T>
struct Pass {
  using M = Math<T>;
  static constexpr int G = Cell::gates, S = Cell::states;

  // ---------------------------------------------------------------- forward

  static int64_t packed_values(const Sizes& z) {
    const int64_t forward = G * z.H * M::width * vectors<T>(z.H),
                  transposed = z.H * M::width * vectors<T>(G * z.H);
    return forward > transposed ? forward : transposed;
  }

  static void pack_forward(const Forward<T>& f, T* packed) {
    pack(f.w_hh, 1, f.size.H, f.size.H, G * f.size.H, packed);
  }

  static Workspace forward_workspace(const Sizes& z, const Share& share) {
    return {(1 + kTileRows) * stride<T>(G * z.H), 0, share.end - share.begin + share.rows};
  }

  static void forward(const Forward<T>& f, const Share& share, const T* packed, T* values, int64_t* numbers) {
    const FlushDenormals guard;
    const Layout<Cell, T, Forward<T>, T> at{f, share.schedule};
    const int64_t B = at.B, H = at.H, width = stride<T>(G * H);
    const Columns<T> w{packed, H * M::width, 0};
    T* bias = values;
    T* u = bias + width;  // (kTileRows, G*H)
    int64_t* sequences = numbers;
    int64_t* running = sequences + (share.end - share.begin);
    int64_t n_running = 0;

    zero(width, bias);
    if (f.b_hh) copy(G * H, f.b_hh, bias);

    for (int64_t t = 0; t < share.steps; ++t) {
      int64_t n_sequences = 0;
      for (int64_t b = share.begin; b < share.end; ++b)
        if (t < f.swaps.lengths[b]) sequences[n_sequences++] = b;
      int64_t starting = share.schedule.start_begin[t];
      const int64_t start_end = share.schedule.start_begin[t + 1];

      each_panel(n_sequences + n_running, [&](int64_t first, int count) {
        const T* h[kTileRows];
        const T* init[kTileRows];
        T* out[kTileRows];
        const T* s[kTileRows][S];
        for (int r = 0; r < count; ++r) {
          const int64_t row = first + r;
          if (row < n_sequences)
            at.before(sequences[row], t, s[r]);
          else
            variant_after(f, at, running[row - n_sequences], t - 1, const_cast<T**>(s[r]));
          h[r] = s[r][0];
          init[r] = bias;
          out[r] = u + r * width;
        }
        panel(count, vectors<T>(G * H), H, h, 1, w, init, out);

        for (int r = 0; r < count; ++r) {
          T* next[S];
          if (first + r >= n_sequences) {
            const int64_t v = running[first + r - n_sequences];
            const T* x = f.x_proj + (at.source(v, t) * B + at.sequence(v)) * G * H;
            T* gates = variant_after(f, at, v, t, next);
            step_row<Cell>(H, x, out[r], s[r], next, gates);
            continue;
          }
          const int64_t b = sequences[first + r];
          T* gates = at.after(b, t, next);
          step_row<Cell>(H, f.x_proj + (t * B + b) * G * H, out[r], s[r], next, f.train ? gates : nullptr);
          for (; starting < start_end && at.sequence(share.schedule.by_start[starting]) == b; ++starting) {
            const int64_t v = share.schedule.by_start[starting];
            gates = variant_after(f, at, v, t, next);
            step_row<Cell>(H, f.x_proj + (at.j(v) * B + b) * G * H, out[r], s[r], next, gates);
          }
        }
      });

      for (int64_t e = share.schedule.end_begin[t]; e < share.schedule.end_begin[t + 1]; ++e)
        finish(f, at, share.schedule.by_end[e], t);
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
        if (f.train) zero(Cell::saved * H, gates);
      }
    }
  }

  // Where variant v's states and gates go at step t: into its span, or in inference into its result, over and
  // over.
  static T* variant_after(const Forward<T>& f, const Layout<Cell, T, Forward<T>, T>& at, int64_t v, int64_t t,
                          T** s) {
    if (f.train) return at.span(v, t, s);
    for (int k = 0; k < S; ++k) s[k] = f.variants[k] + v * f.size.H;
    return nullptr;
  }

  // The result of variant v, whose end is t.
  static void finish(const Forward<T>& f, const Layout<Cell, T, Forward<T>, T>& at, int64_t v, int64_t t) {
    const int64_t H = at.H;
    T* original[S];
    T* from[S];
    at.after(at.sequence(v), t, original);
    if (at.i(v) == at.j(v))
      at.after(at.sequence(v), t, from);
    else
      variant_after(f, at, v, t, from);
    for (int k = 0; k < S; ++k) copy(H, from[k], f.variants[k] + v * H);
    typename M::V total{};
    each_vector<T>(H, [&](int64_t h, auto... n) __attribute__((always_inline)) {
      const auto d = M::load(f.variants[0] + v * H + h, n...) - M::load(original[0] + h, n...);
      total += d * d;
    });
    f.penalty[v] = M::sum(total);
  }

  // ---------------------------------------------------------------- backward

  static void pack_backward(const Backward<T>& g, T* packed) {
    pack(g.w_hh, g.size.H, 1, G * g.size.H, g.size.H, packed);
  }

  static int64_t weight_stride(const Sizes& z) { return stride<T>(z.H); }

  // Rows that are collected before they are added to dW_hh: each time, all of dW_hh is read and written. No
  // step has more than half as many: its originals and its running variants are at most share.rows each.
  static int64_t collected(const Share& share) { return share.rows > 64 ? 2 * share.rows : 128; }

  static Workspace backward_workspace(const Sizes& z, const Share& share) {
    const int64_t states = S * stride<T>(z.H), sequences = share.end - share.begin;
    const int64_t sums = G * z.H * stride<T>(z.H) + stride<T>(G * z.H);
    return {
        sums + (sequences + share.rows) * states + collected(share) * (stride<T>(G * z.H) + stride<T>(z.H)),
        share.rows, sequences + 3 * share.rows};
  }

  static void backward(const Backward<T>& g, const Share& share, const T* packed, T* values, T** pointers,
                       int64_t* numbers) {
    const FlushDenormals guard;
    const Layout<Cell, T, Backward<T>, const T> at{g, share.schedule};
    const int64_t B = at.B, H = at.H, n_shared = share.end - share.begin;
    const int64_t h_stride = stride<T>(H), u_stride = stride<T>(G * H), state_stride = S * h_stride;
    const Columns<T> w{packed, G * H * M::width, 0};

    T* dw = values;
    T* db = dw + G * H * h_stride;
    T* ds_sequences = db + u_stride;                       // (sequences, S, H)
    T* ds_slots = ds_sequences + n_shared * state_stride;  // (rows, S, H), one for each running variant
    T* du = ds_slots + share.rows * state_stride;          // (collected, G*H)
    T* h_before = du + collected(share) * u_stride;        // (collected, H)
    zero(h_before + collected(share) * h_stride - values, values);
    T** ds_rows = pointers;
    int64_t* row_of = numbers;  // sequence -> its row of du at this step
    int64_t* running = row_of + n_shared;
    int64_t* slot_of = running + share.rows;
    int64_t* free_slots = slot_of + share.rows;
    int64_t n_running = 0, n_free = share.rows, n_collected = 0;
    for (int64_t n = 0; n < share.rows; ++n) free_slots[n] = n;

    if (g.dx_proj)
      for (int64_t t = 0; t < g.size.T; ++t)
        zero(n_shared * G * H, g.dx_proj + (t * B + share.begin) * G * H);
    auto dx_row = [&](int64_t t, int64_t b) { return g.dx_proj ? g.dx_proj + (t * B + b) * G * H : nullptr; };

    for (int64_t t = share.steps - 1; t >= 0; --t) {
      const int64_t ending = share.schedule.end_begin[t + 1] - share.schedule.end_begin[t];
      if (n_collected + n_shared + n_running + ending > collected(share)) {
        flush(g, n_collected, du, h_before, dw, db);
        n_collected = 0;
      }
      T* const du_now = du + n_collected * u_stride;
      T* const h_now = h_before + n_collected * h_stride;
      int64_t rows = 0;

      for (int64_t b = share.begin; b < share.end; ++b) {
        if (t >= g.swaps.lengths[b]) continue;
        const bool last = t == g.swaps.lengths[b] - 1;
        row_of[b - share.begin] = rows++;
        for (int k = 0; k < S; ++k) {
          T* ds = ds_sequences + (b - share.begin) * state_stride + k * h_stride;
          if (g.d_states[k]) add(H, g.d_states[k] + (t * B + b) * H, ds);
          if (last && g.d_last[k]) add(H, g.d_last[k] + b * H, ds);
        }
      }
      for (int64_t e = share.schedule.end_begin[t]; e < share.schedule.end_begin[t + 1]; ++e) {
        const int64_t v = share.schedule.by_end[e];
        T* ds = ds_sequences + (at.sequence(v) - share.begin) * state_stride;
        if (at.i(v) < at.j(v)) {
          running[n_running] = v;
          slot_of[n_running] = free_slots[--n_free];
          start_variant(g, at, v, t, ds, ds_slots + slot_of[n_running++] * state_stride);
        } else {
          for (int k = 0; k < S; ++k)
            if (g.d_variants[k]) add(H, g.d_variants[k] + v * H, ds + k * h_stride);
        }
      }

      const T* s[S];
      const T* next[S];
      T* ds[S];
      for (int64_t b = share.begin; b < share.end; ++b) {
        if (t >= g.swaps.lengths[b]) continue;
        const int64_t row = row_of[b - share.begin];
        for (int k = 0; k < S; ++k) ds[k] = ds_sequences + (b - share.begin) * state_stride + k * h_stride;
        at.before(b, t, s);
        const T* gates = at.after(b, t, next);
        step_backward_row<Cell, false>(H, ds, s, next, gates, dx_row(t, b), du_now + row * u_stride, ds);
        copy(H, s[0], h_now + row * h_stride);
        ds_rows[row] = ds[0];
      }
      int64_t kept = 0;
      for (int64_t r = 0; r < n_running; ++r) {
        const int64_t v = running[r], b = at.sequence(v), slot = slot_of[r];
        T* slot_ds[S];
        for (int k = 0; k < S; ++k) slot_ds[k] = ds_slots + slot * state_stride + k * h_stride;
        const T* gates = at.span(v, t, next);
        T* dx = dx_row(at.source(v, t), b);
        if (t == at.i(v)) {
          // the span ends here: what is left goes to the original, from whose state the variant started
          for (int k = 0; k < S; ++k) ds[k] = ds_sequences + (b - share.begin) * state_stride + k * h_stride;
          at.before(b, t, s);
          step_backward_row<Cell, true>(H, slot_ds, s, next, gates, dx,
                                        du_now + row_of[b - share.begin] * u_stride, ds);
          free_slots[n_free++] = slot;
        } else {
          at.span(v, t - 1, s);
          step_backward_row<Cell, false>(H, slot_ds, s, next, gates, dx, du_now + rows * u_stride, slot_ds);
          copy(H, s[0], h_now + rows * h_stride);
          ds_rows[rows++] = slot_ds[0];
          running[kept] = v;
          slot_of[kept++] = slot;
        }
      }
      n_running = kept;

      each_panel(rows, [&](int64_t first, int count) {
        const T* a[kTileRows];
        for (int r = 0; r < count; ++r) a[r] = du_now + (first + r) * u_stride;
        panel(count, vectors<T>(H), G * H, a, 1, w, ds_rows + first, ds_rows + first);
      });
      n_collected += rows;
    }
    flush(g, n_collected, du, h_before, dw, db);
    for (int k = 0; k < S; ++k)
      if (g.d_start[k])
        for (int64_t n = 0; n < n_shared; ++n)
          copy(H, ds_sequences + n * state_stride + k * h_stride, g.d_start[k] + (share.begin + n) * H);
  }

  // The gradient of variant v at its end t, into its own states, (S, H), and for the penalty into the
  // original's.
  static void start_variant(const Backward<T>& g, const Layout<Cell, T, Backward<T>, const T>& at, int64_t v,
                            int64_t t, T* ds_original, T* ds_variant) {
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

  // dW_hh += du' h and db_hh += du over n rows.
  static void flush(const Backward<T>& g, int64_t n, const T* du, const T* h_before, T* dw, T* db) {
    const int64_t H = g.size.H, h_stride = stride<T>(H), u_stride = stride<T>(G * H);
    if (g.dw_hh) {
      const Columns<T> h{h_before, M::width, h_stride};
      each_panel(G * H, [&](int64_t first, int count) {
        const T* a[kTileRows];
        T* out[kTileRows];
        for (int r = 0; r < count; ++r) {
          a[r] = du + first + r;
          out[r] = dw + (first + r) * h_stride;
        }
        panel(count, vectors<T>(H), n, a, u_stride, h, out, out);
      });
    }
    if (g.db_hh)
      for (int64_t r = 0; r < u_stride; r += M::width) {
        typename M::V sum{};  // of these rows first: added one by one to a large total they would lose digits
        for (int64_t m = 0; m < n; ++m) sum += M::load(du + m * u_stride + r);
        M::store(db + r, M::load(db + r) + sum);
      }
  }

  static constexpr Kernels<T> kernels() {
    return {G,
            Cell::saved,
            packed_values,
            pack_forward,
            pack_backward,
            forward_workspace,
            backward_workspace,
            forward,
            backward,
            weight_stride};
  }
};

}  // namespace

#define SIRE_QUOTE(x) #x
#define SIRE_NAME(isa) SIRE_QUOTE(isa)
#define SIRE_JOIN(a, b) a##b
#define SIRE_SET(isa) SIRE_JOIN(k, isa)

const InstructionSet SIRE_SET(SIRE_ISA) = {
    SIRE_NAME(SIRE_ISA),
    {Pass<RnnTanh, float>::kernels(), Pass<RnnRelu, float>::kernels(), Pass<Gru, float>::kernels(),
     Pass<Lstm, float>::kernels()},
    {Pass<RnnTanh, double>::kernels(), Pass<RnnRelu, double>::kernels(), Pass<Gru, double>::kernels(),
     Pass<Lstm, double>::kernels()},
};

}  // namespace sire_fast
