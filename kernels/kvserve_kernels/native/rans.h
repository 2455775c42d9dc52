/* Interleaved rANS for integers: what the three implementations share.
 *
 * The stream is that of kvserve_kernels/rans/rans_cpu.py: 32 lanes are 32 tokens of one channel, 32-bit states with
 * lower bound 2^16, one stream of 16-bit words, 12-bit probabilities, tables of at most 32 symbols. A value v is
 * symbol (v - base) >> low_bits; its low bits go into planes, one bit of 32 tokens a word. */
#ifndef KVSERVE_RANS_H
#define KVSERVE_RANS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANES 32
#define SYMBOLS 32
#define TOTAL 4096
#define LOWER 65536u
/* streams in flight: enough for the latency of one step to hide behind the others */
#define MAX_STREAMS 8
/* groups of lanes between two checks that the words suffice */
#define BLOCK 8
#define TABLES 256
/* of magnitudes, by which a channel's table is chosen */
#define BINS 17
#define BIN_PAIRS 9

typedef struct {
    /* for decoding, by node of a search tree with root 1: the last slot of the left side; and by leaf */
    uint16_t tree[SYMBOLS];
    uint16_t scaled[SYMBOLS]; /* frequency << 4 */
    uint16_t leaf_start[SYMBOLS];
    /* for encoding, by symbol */
    uint16_t frequency[SYMBOLS];
    uint16_t start[SYMBOLS];
    uint16_t whole[SYMBOLS]; /* 2^32 / frequency: upper and lower half */
    uint16_t part[SYMBOLS];
    uint32_t pair[SYMBOLS];   /* start << 16 | frequency */
    float inverse[SYMBOLS];   /* a little below 1 / frequency */
    uint64_t reciprocal[SYMBOLS]; /* 2^44 / frequency + 1 */
    int32_t base;
    int32_t low_bits;
    int32_t escape; /* the escape's symbol, or -1 */
    int32_t span;   /* values from base on that need no escape; 65536 without one */
    int32_t depth;  /* of the tree; 0 if one symbol has the whole range, which then costs nothing */
    int32_t sole;   /* that symbol */
    int32_t outside; /* the symbol of what needs an escape; 0 where nothing may */
    int32_t pad[9];
} Table;

typedef struct {
    uint16_t hi[LANES];
    uint16_t lo[LANES];
} State;

/* The streams of one block of groups of one channel. Stream v is `stride` values and `plane_stride` words further on. */
typedef struct {
    const Table *table;
    const uint32_t *slots; /* [4096] frequency - 1 << 20 | offset << 8 | symbol; not for AVX-512 */
    State *states;
    ptrdiff_t stride;
    ptrdiff_t plane_stride;
} Block;

/* Code lengths of all tables for values of each magnitude, and what a channel may choose from. */
typedef struct {
    int32_t count;
    int32_t keep; /* a channel takes the table of the one after it if that costs at most so much more */
    int16_t lengths[BIN_PAIRS][TABLES][2]; /* for two successive bins; 32767 for tables that there are not */
} Prices;

typedef struct {
    void (*decode)(int streams, const Block *, const uint16_t **words, const uint32_t *planes, int16_t *out, int groups);
    void (*decode_part)(const Block *, const uint16_t **words, const uint32_t *planes, int16_t *out, int count);
    void (*encode)(int streams, const Block *, uint16_t **words, uint32_t *planes, const int16_t *in, int groups);
    void (*encode_part)(const Block *, uint16_t **words, uint32_t *planes, const int16_t *in, int count);
    /* writes the values outside the table's span, in order; returns their number */
    int64_t (*escapes)(const int16_t *row, int64_t tokens, const Table *, int16_t *out);
    /* puts them back; returns how many were wanted, of which it takes `left` at most */
    int64_t (*restore)(int16_t *row, int64_t tokens, const Table *, const int16_t *escapes, int64_t left);
    int (*choose)(const int16_t *row, int64_t tokens, const Prices *, int after);
} Level;

extern const Level kvserve_portable;
#if defined(__x86_64__) && !defined(KVSERVE_PORTABLE_ONLY)
extern const Level kvserve_avx2;
extern const Level kvserve_avx512;
#endif

/* Scalar steps that the wide implementations use for the last lanes. */
void kvserve_decode_part(const Block *, const uint16_t **words, const uint32_t *planes, int16_t *out, int count);
void kvserve_encode_part(const Block *, uint16_t **words, uint32_t *planes, const int16_t *in, int count);

/* The least magnitude of each bin; bins.py has the same. */
static const int32_t least_magnitudes[BINS] = {
    0, 1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384,
};

/* Whether a value needs an escape. */
static inline int is_outside(const Table *t, int16_t value)
{
    int32_t distance = (int32_t)value - t->base;
    return distance < 0 || distance >= t->span;
}

#endif
