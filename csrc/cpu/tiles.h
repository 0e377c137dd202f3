// Matrix products on AMX tiles, for a processor that multiplies bfloat16 numbers far faster than float32 ones.
//
// A tile instruction adds to 16 x 16 float32 sums 32 products each of bfloat16 numbers: 16 times the work per cycle of AVX-512's
// multiply-adds. Numbers of more bits are cut into pieces: the nearest bfloat16 number, the nearest to what is left of it, and so
// on. Every piece takes 8 bits and what is left is exact, so a float32 number is the sum of three pieces, a float16 number of two.
// With x = x0 + x1 + x2 and y likewise,
//
//   x y = x0 y0 + x0 y1 + x1 y0 + x0 y2 + x1 y1 + x2 y0 + ...    6 products for float32, 3 for float16, 1 for bfloat16
//
// and what is left out is 2**-23 of x y at most, 2**-16 for float16, whose numbers have 11 bits. The sums round like float32 sums.
// What differs: the rest of an infinite number is NaN, and so is the product; subnormal numbers count as zero.
//
// An operand is stored as tiles of 1 KiB that hold pairs of numbers adjacent along the sum's index k:
//   Left   A [rows, depth]      tile[i][k / 2] = (A[i][k], A[i][k + 1])      16 rows x 32
//   Right  B [depth, columns]   tile[k / 2][j] = (B[k][j], B[k + 1][j])      32 x 16 columns
// So a tile of A is the transpose, as 16 x 16 words, of a tile of B = A^T. What an operand lacks to whole tiles is zero.
#pragma once

#include "gemm.h"

namespace sora::SORA_TIER {

constexpr bool kTiles = true;

constexpr int kTileFloats = 256;  // a tile's size
constexpr int kTileDepth = 32;

template <class T>
constexpr int kPieces = sizeof(T) == 4 ? 3 : 2;
template <>
inline constexpr int kPieces<bfloat16> = 1;

// The compiler's own tile functions do not say that they touch memory, and take constants only.
template <int t>
SORA_INLINE void tile_load(const float* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride * sizeof(float)), "i"(t) : "memory");
}
template <int t>
SORA_INLINE void tile_store(float* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride * sizeof(float)), "i"(t) : "memory");
}
template <int t>
SORA_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(t));
}
template <int c, int a, int b>
SORA_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

// The nearest bfloat16 number in each lane's upper half; x becomes what is left of it. Lanes past the largest bfloat16 number are
// cut off instead: rounded up, finite ones would be infinite, and NaNs whose bits are all ones zero.
SORA_INLINE vu take_piece(vf& x) {
  constexpr uint32_t kEnd = 0x7f7f8000;  // half a step past it
  const vu word = bits<vu>(x), half = bits<vu>((word & 0x7fffffff) < kEnd) & 0x8000;
  const vu piece = (word + half) & 0xffff0000;
  x -= bits<vf>(piece);
  return piece;
}

// Words of the upper halves of two vectors' lanes: (low, high).
SORA_INLINE vf pair_up(vu low, vu high) { return bits<vf>(high | low >> 16); }

// Products of operands of storage type T; gemm.h has the same for vectors.
template <class T>
class Multiplier {
  static constexpr int P = kPieces<T>;
  static int steps(int64_t depth) { return static_cast<int>((depth + kTileDepth - 1) / kTileDepth); }

 public:
  // Tiles need their shapes set, per thread; and switching threads is cheaper once they are given back.
  class Session {
   public:
    Session() {
      struct alignas(64) {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
      } config = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
      asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~Session() { asm volatile("tilerelease"); }
    Session(const Session&) = delete;
  };

  struct Operand {
    float* tiles;
    int64_t next;  // floats from one row of A's tiles, or column of B's, to the next
  };
  using Left = Operand;
  using Right = Operand;

  static int64_t left_size(int64_t rows, int64_t depth) { return (rows + 15) / 16 * steps(depth) * P * kTileFloats; }
  static int64_t right_size(int64_t depth, int64_t columns) { return left_size(columns, depth); }

  // A = X, X^T or B = X, X^T, where X is `rows` rows of `columns` numbers, row n at x + n * stride.
  template <class S>
  static Left left(const S* x, int64_t stride, int rows, int columns, float* to) {
    return from_neighbours<false>(x, stride, rows, columns, to);
  }
  template <class S>
  static Right right_transposed(const S* x, int64_t stride, int rows, int columns, float* to) {
    return from_neighbours<true>(x, stride, rows, columns, to);
  }
  template <class S>
  static Right right(const S* x, int64_t stride, int rows, int columns, float* to) {
    return from_stacked<false>(x, stride, rows, columns, to);
  }
  template <class S>
  static Left left_transposed(const S* x, int64_t stride, int rows, int columns, float* to) {
    return from_stacked<true>(x, stride, rows, columns, to);
  }
  static Left left_transposed_at(float* to, int, int depth) { return left_room(to, 0, depth); }

  static Left from_row(Left a, int n) { return {a.tiles + n / 16 * a.next, a.next}; }
  static Left from_depth(Left a, int n) { return {a.tiles + n / kTileDepth * P * kTileFloats, a.next}; }
  static Left from_column(Left b, int n) { return from_row(b, n); }

  // Operands that are filled as they are computed; gemm's multiplier says how. What is not put must not matter.
  static constexpr bool kRough = sizeof(T) == 2;  // whether 16 bits are all that results keep
  static constexpr bool kInPlace = false;
  static constexpr int kDepth = kTileDepth;
  static Left left_room(float* to, int, int depth) { return {to, steps(depth) * P * kTileFloats}; }
  static Right right_room(float* to, int depth, int) { return {to, steps(depth) * P * kTileFloats}; }
  SORA_INLINE static void put_row(Left a, int i, int j, vf low, vf high) {
    float* to = a.tiles + i / 16 * a.next + j / kTileDepth * P * kTileFloats + i % 16 * W;
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) store(to + p * kTileFloats, upper_halves(take_piece(low), take_piece(high)));
  }
  SORA_INLINE static void put_pair(Right b, int k, int j, vf even, vf odd) {
    float* to = b.tiles + j / 16 * b.next + k / kTileDepth * P * kTileFloats + k % kTileDepth / 2 * W;
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) store(to + p * kTileFloats, pair_up(take_piece(even), take_piece(odd)));
  }

  // C [rows, columns] (op)= A B. C is read and written up to whole tiles.
  template <Init init>
  static void multiply(int rows, int columns, int depth, Left a, Right b, float* c, int64_t ldc) {
    const DepthPart<Left> part{a, depth};
    multiply_parts<init>(rows, columns, &part, 1, b, c, ldc);
  }
  static void add_parts(int rows, int columns, const DepthPart<Left>* parts, int count, Right b, float* c, int64_t ldc) {
    multiply_parts<Init::kAdd>(rows, columns, parts, count, b, c, ldc);
  }
  template <class Out>
  static void multiply_to(Out out, int rows, int columns, int depth, Left a, Right b, float* room) {
    const int64_t row = padded(columns);
    multiply<Init::kZero>(rows, columns, depth, a, b, room, row);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; j += W) out.put(i, j, load(room + i * row + j));
  }
  static void multiply_precisely(int rows, int columns, int depth, Left a, Right b, float* c, int64_t ldc) {
    multiply<Init::kZero>(rows, columns, depth, a, b, c, ldc);
  }

 private:
  template <Init init>
  static void multiply_parts(int rows, int columns, const DepthPart<Left>* parts, int count, Right b, float* c, int64_t ldc) {
    for (int i = 0; i < rows; i += 32)
      for (int j = 0; j < columns; j += 32) {
        const bool tall = i + 16 < rows, wide = j + 16 < columns;
        const auto block = tall   ? wide ? multiply_block<init, true, true> : multiply_block<init, true, false>
                           : wide ? multiply_block<init, false, true>
                                  : multiply_block<init, false, false>;
        block(parts, count, i / 16, b.tiles + j / 16 * b.next, b.next, c + i * ldc + j, ldc);
      }
  }

  // 2 x 2 tiles of C (fewer unless tall, wide), from A's row of tiles `i` on, in tiles 0-3; tiles 4-5 hold A, 6-7 B.
  template <Init init, bool tall, bool wide>
  static void multiply_block(const DepthPart<Left>* parts, int count, int i, const float* b, int64_t b_next, float* c,
                             int64_t ldc) {
    float* const c_next = c + 16 * ldc;
    if (init == Init::kZero) {
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    } else {
      tile_load<0>(c, ldc);
      if (wide) tile_load<1>(c + 16, ldc);
      if (tall) tile_load<2>(c_next, ldc);
      if (tall && wide) tile_load<3>(c_next + 16, ldc);
    }
    for (; count > 0; --count, ++parts) {
      const int64_t a_next = parts->a.next;
      const float* a = parts->a.tiles + i * a_next;
      for (int n = steps(parts->depth); n > 0; --n, a += P * kTileFloats, b += P * kTileFloats)
        multiply_pieces<tall, wide, 0>(a, a_next, b, b_next);
    }
    tile_store<0>(c, ldc);
    if (wide) tile_store<1>(c + 16, ldc);
    if (tall) tile_store<2>(c_next, ldc);
    if (tall && wide) tile_store<3>(c_next + 16, ldc);
  }

  // Pieces (i, j) of A and B in an order in which each product shares an operand with the one before, which is a load less.
  struct Pair {
    int i, j;
  };
  static constexpr Pair kOrder[][6] = {{{0, 0}}, {{0, 1}, {0, 0}, {1, 0}}, {{0, 2}, {0, 0}, {0, 1}, {1, 1}, {1, 0}, {2, 0}}};

  template <bool tall, bool wide, int n>
  SORA_INLINE static void multiply_pieces(const float* a, int64_t a_next, const float* b, int64_t b_next) {
    constexpr Pair pair = kOrder[P - 1][n], before = n > 0 ? kOrder[P - 1][n - 1] : Pair{-1, -1};
    if (pair.j != before.j) {
      tile_load<6>(b + pair.j * kTileFloats, 16);
      if (wide) tile_load<7>(b + b_next + pair.j * kTileFloats, 16);
    }
    if (pair.i != before.i) tile_load<4>(a + pair.i * kTileFloats, 16);
    tile_multiply<0, 4, 6>();
    if (wide) tile_multiply<1, 4, 7>();
    if (tall) {
      if (pair.i != before.i) tile_load<5>(a + a_next + pair.i * kTileFloats, 16);
      tile_multiply<2, 5, 6>();
      if (wide) tile_multiply<3, 5, 7>();
    }
    if constexpr (n + 1 < P * (P + 1) / 2) multiply_pieces<tall, wide, n + 1>(a, a_next, b, b_next);
  }

  // Operands whose depth runs along the rows of X, and down its columns.
  template <bool transposed, class S>
  static Operand from_neighbours(const S* x, int64_t stride, int rows, int columns, float* to) {
    const Operand result = left_room(to, rows, columns);
    for (int i = 0; i < rows; i += 16)
      for (int k = 0; k < columns; k += kTileDepth, to += P * kTileFloats)
        neighbours<transposed>(x, stride, rows, columns, i, k, to);
    return result;
  }
  template <bool transposed, class S>
  static Operand from_stacked(const S* x, int64_t stride, int rows, int columns, float* to) {
    const Operand result = right_room(to, rows, columns);
    for (int j = 0; j < columns; j += 16)
      for (int k = 0; k < rows; k += kTileDepth, to += P * kTileFloats) stacked<transposed>(x, stride, rows, columns, k, j, to);
    return result;
  }

  template <bool full, class S>
  SORA_INLINE static vf element(const S* x, int64_t stride, int rows, int columns, int i, int j) {
    const S* p = x + i * stride + j;
    if (full) return load(p);
    if (i >= rows || j >= columns) return vf{};
    return columns - j >= W ? load(p) : load(p, columns - j);
  }

  // Of two vectors of `size` bytes' numbers, in each lane of 16 bytes: the lower halves, or the upper ones, number by number.
  template <int size, bool upper>
  SORA_INLINE static vf interleave(vf a, vf b) {
    typedef uint16_t vs __attribute__((vector_size(64)));
    constexpr int n = size / 2, lane = 8;
    vs order;
    for (int i = 0; i < 32; ++i) {
      const int in_lane = i % lane / (2 * n) * n + (upper ? lane / 2 : 0) + i % n;
      order[i] = i / lane * lane + in_lane + (i / n % 2 == 1 ? 32 : 0);
    }
    return bits<vf>(__builtin_shuffle(bits<vs>(a), bits<vs>(b), order));
  }

  // A tile of the transpose of 32 rows of 16 numbers of 16 bits. Lane l of a vector takes 8 numbers of row 8 l + r, so that only
  // blocks of 8 x 8 are left to transpose, within lanes: half the shuffles of a transpose of 16 x 16 words.
  template <class S>
  static void transpose_halves(const S* x, int64_t stride, float* to) {
    for (int j = 0; j < 16; j += 8) {
      vf a[8], b[8];
      for (int r = 0; r < 8; ++r)
        for (int l = 0; l < 4; ++l) memcpy(reinterpret_cast<char*>(&a[r]) + 16 * l, x + (8 * l + r) * stride + j, 16);
      for (int r = 0; r < 8; r += 2) b[r] = interleave<2, false>(a[r], a[r + 1]), b[r + 1] = interleave<2, true>(a[r], a[r + 1]);
      for (int r = 0; r < 8; r += 4)
        for (int n = 0; n < 2; ++n) {
          a[r + 2 * n] = interleave<4, false>(b[r + n], b[r + 2 + n]);
          a[r + 2 * n + 1] = interleave<4, true>(b[r + n], b[r + 2 + n]);
        }
      for (int n = 0; n < 4; ++n) {
        store(to + (j + 2 * n) * W, interleave<8, false>(a[n], a[n + 4]));
        store(to + (j + 2 * n + 1) * W, interleave<8, true>(a[n], a[n + 4]));
      }
    }
  }

  // P tiles of 16 rows x 32 columns at (i, j), [row][pair of columns] or its transpose.
  template <bool transposed, class S>
  static void neighbours(const S* x, int64_t stride, int rows, int columns, int i, int j, float* to) {
    if (i + 16 <= rows && j + 32 <= columns)
      neighbours<transposed, true>(x, stride, rows, columns, i, j, to);
    else
      neighbours<transposed, false>(x, stride, rows, columns, i, j, to);
  }
  template <bool transposed, bool full, class S>
  static void neighbours(const S* x, int64_t stride, int rows, int columns, int i, int j, float* to) {
    vf words[P][W];
    for (int n = 0; n < W; ++n) {
      if constexpr (full && sizeof(S) == 2 && P == 1) {
        words[0][n] = load(reinterpret_cast<const float*>(x + (i + n) * stride + j));
        continue;
      }
      vf low = element<full>(x, stride, rows, columns, i + n, j), high = element<full>(x, stride, rows, columns, i + n, j + W);
      for (int p = 0; p < P; ++p) words[p][n] = upper_halves(take_piece(low), take_piece(high));
    }
    put<transposed>(words, to);
  }

  // P tiles of 32 rows x 16 columns at (i, j), [pair of rows][column] or its transpose.
  template <bool transposed, class S>
  static void stacked(const S* x, int64_t stride, int rows, int columns, int i, int j, float* to) {
    if (i + 32 <= rows && j + 16 <= columns)
      stacked<transposed, true>(x, stride, rows, columns, i, j, to);
    else
      stacked<transposed, false>(x, stride, rows, columns, i, j, to);
  }
  template <bool transposed, bool full, class S>
  static void stacked(const S* x, int64_t stride, int rows, int columns, int i, int j, float* to) {
    if constexpr (transposed && full && sizeof(S) == 2 && P == 1) return transpose_halves(x + i * stride + j, stride, to);
    vf words[P][W];
    for (int n = 0; n < W; ++n) {
      vf even = element<full>(x, stride, rows, columns, i + 2 * n, j),
         odd = element<full>(x, stride, rows, columns, i + 2 * n + 1, j);
      for (int p = 0; p < P; ++p) words[p][n] = pair_up(take_piece(even), take_piece(odd));
    }
    put<transposed>(words, to);
  }

  template <bool transposed>
  SORA_INLINE static void put(vf (&words)[P][W], float* to) {
    for (int p = 0; p < P; ++p) {
      if constexpr (transposed) transpose(words[p]);
      for (int n = 0; n < W; ++n) store(to + p * kTileFloats + n * W, words[p][n]);
    }
  }

  // The upper halves of all lanes of a, then of b, as 32 numbers.
  SORA_INLINE static vf upper_halves(vu a, vu b) {
    typedef uint16_t vs __attribute__((vector_size(64)));
    vs order;
    for (int i = 0; i < 32; ++i) order[i] = 2 * i + 1;
    return bits<vf>(__builtin_shuffle(bits<vs>(a), bits<vs>(b), order));
  }
};

}  // namespace sora::SORA_TIER
