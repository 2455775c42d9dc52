/* The linear transform between cache values and integer levels; kvserve_kernels/linear/linear_ref.py defines it.
 *
 * Values are turned back, centred, scaled to int8 and multiplied by an int8 matrix: exact integers, then single float32
 * operations that must not be fused (compile with -ffp-contract=off). Products run in blocks of 32 by 32 over tiles of
 * 1 KiB, so laid out that the tile unit (AMX) and the dot products of AVX-512 (VNNI, BF16) read the same ones:
 *
 *   int8 matrix   [component / 16][value / 64]        tile [16 components][64 values]
 *   int8 values   [token / 16][value / 64]            tile [16 quads of values][16 tokens][4 values]
 *   bf16 levels   [token / 16][component / 32]        tile [16 tokens][32 components]
 *   bf16 matrix   [slot][value / 16][component / 32]  tile [16 pairs of components][16 values][2 components] */
#ifndef KVSERVE_LINEAR_H
#define KVSERVE_LINEAR_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int64_t slots, width, components;
    int64_t stored;                          /* components of the matrices, at least as many */
    const int32_t *rows, *heads, *rotations; /* [slots] */
    const float *mean, *inv_scale;           /* [width] */
    const float *factor, *offset, *delta;    /* [components, up to a multiple of 32] */
    const int32_t *bias;                     /* the same: 128 times the sum of the matrix's row */
    const int8_t *matrix;                    /* tiles, zeros beyond the components and the width */
    const uint16_t *inverse;                 /* tiles, zeros beyond the components and the values of a slot; aligned */
    float unit;                              /* what levels are multiplied by before the inverse */
} Group;

typedef struct {
    int64_t tokens, dim;
    int64_t row_stride, token_stride, head_stride; /* bytes */
    int64_t type;                                  /* of values: BFLOAT16, FLOAT16 or FLOAT32 */
    int64_t pairs, is_interleaved;
    int64_t rows;           /* of `values`; what follows them is in `more` */
    char *values, *more;    /* [rows, tokens, heads, dim] */
    const float *cos, *sin; /* [rotations, tokens, pairs] */
    const int32_t *order;   /* tokens that runs refer to, or NULL for all as they come */
} Piece;

/* Tokens that a group codes with its step; of all runs that go together slots and matrices are the same. */
typedef struct {
    const Group *group;
    int64_t start, tokens; /* in the order */
    int16_t *levels;       /* [components, tokens] */
} Run;

/* Memory for blocks of tokens. */
typedef struct {
    char *memory;
    int64_t columns; /* of 32 tokens, of a block */
    int level, is_inverse;
} Bench;

/* 32 tokens of a run, of which `tokens` exist; `start` is counted from the run's first. */
typedef struct {
    const Run *run;
    int64_t start, tokens;
    char *tiles;
    float powers[32];
} Column;

enum { BFLOAT16, FLOAT16, FLOAT32 };
/* what each level of a processor adds */
enum { NO_LINEAR, INT8_DOTS, BF16_DOTS, TILES };
enum { DONE, REFUSED, NO_MEMORY };

#if defined(__x86_64__) && defined(__linux__) && __GNUC__ >= 11 && !defined(KVSERVE_PORTABLE_ONLY)
#define KVSERVE_LINEAR
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16")
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
/* The tile intrinsics do not tell the compiler that they read memory. */
#define READ_MEMORY __asm__ volatile("" : : : "memory")
/* columns of a block: all that fits beside the matrix in the second cache */
#define MOST_COLUMNS 16
#define BLOCK_BYTES (1 << 20)

INLINE int64_t up(int64_t n, int64_t unit)
{
    return (n + unit - 1) / unit * unit;
}

INLINE int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* A mask of the first n of 16. */
INLINE __mmask16 first(int64_t n)
{
    return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1);
}

/* Transpose 16 by 16 words of 32 bits. */
INLINE void transpose16(__m512i r[16])
{
    __m512i s[16];
    for (int i = 0; i < 16; i += 2) {
        s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(s[i + j], s[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(s[i + j], s[i + j + 2]);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 16; j += 8) {
            s[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
            s[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 8; j += 4) {
            r[i + j] = _mm512_shuffle_i32x4(s[i + j], s[i + j + 8], 0x88);
            r[i + j + 8] = _mm512_shuffle_i32x4(s[i + j], s[i + j + 8], 0xdd);
        }
}

/* Loads and stores of 16 floats, all of them if `whole`, else by a mask. */
INLINE __m512 load(const float *p, __mmask16 m, int whole)
{
    return whole ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(m, p);
}

/* Neighbours to halves and back: (x y) holds a0 b0 a1 b1 ... */
INLINE void unzip(__m512 x, __m512 y, __m512 *a, __m512 *b)
{
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    *a = _mm512_permutex2var_ps(x, even, y);
    *b = _mm512_permutex2var_ps(x, _mm512_add_epi32(even, _mm512_set1_epi32(1)), y);
}

INLINE void zip(__m512 a, __m512 b, __m512 *x, __m512 *y)
{
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    *x = _mm512_permutex2var_ps(a, low, b);
    *y = _mm512_permutex2var_ps(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b);
}

/* Ask for the values of a head some tokens on: what follows here lies elsewhere, so no prefetcher of the processor
 * would. */
INLINE void prefetch_ahead(const Piece *p, const char *values)
{
    const int64_t bytes = p->dim * (p->type == FLOAT32 ? 4 : 2);
    for (int64_t i = 0; i < bytes; i += 64)
        __builtin_prefetch(values + 12 * p->token_stride + i, 1);
}

/* Add what rounds float32 bits to bfloat16, to nearest even, when the lower half is cut. */
INLINE __m512i round_bf16(__m512 v)
{
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}

/* Where the values of a slot start. */
INLINE char *slot_values(const Piece *p, const Group *g, int64_t s)
{
    const int64_t row = g->rows[s];
    char *values = row < p->rows ? p->values + row * p->row_stride : p->more + (row - p->rows) * p->row_stride;
    return values + g->heads[s] * p->head_stride;
}

INLINE int64_t token_of(const Piece *p, int64_t i)
{
    return p->order ? p->order[i] : i;
}

/* One block: `count` columns, all of one group but for the step. Scratch memory is aligned. */
int kvserve_linear_forward_block(const Piece *, Column *, int64_t count, const Bench *);
int64_t kvserve_linear_forward_bytes(const Group *, int64_t columns);
int kvserve_linear_inverse_block(const Piece *, Column *, int64_t count, const Bench *);
int64_t kvserve_linear_inverse_bytes(const Piece *, const Group *, int64_t columns);
#endif

/* Get ready for runs of these groups; after DONE it must be closed. The level is at least INT8_DOTS. */
int kvserve_bench_open(
    Bench *, const Piece *, const Group *groups, int64_t count, int64_t tokens, int level, int is_inverse);
/* Write the levels or the values of runs that go together. */
int kvserve_linear_runs(const Piece *, const Run *, int64_t count, const Bench *);
void kvserve_bench_close(Bench *);

#endif
