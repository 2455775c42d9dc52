/* rANS with AVX-512 (F, BW, VL, VBMI2): a state is two vectors of 32 halves, a table sits in registers, nothing is
 * gathered.
 *
 * Decoding finds a slot's symbol in a binary search tree, one permutation, one subtraction and one funnel shift a level:
 * the sign of (last slot of the left side - slot) is the next bit of the node's number. */
#if defined(__x86_64__) && !defined(KVSERVE_PORTABLE_ONLY)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx2,bmi,bmi2,popcnt,lzcnt")
#include <immintrin.h>

#include "rows.h"

#define INLINE static inline __attribute__((always_inline))
#define LOAD(p) _mm512_loadu_si512((const void *)(p))
/* streams that advance side by side: what the registers hold */
#define SIDE 4

typedef struct {
    __m512i tree, scaled, start, root, offset;
} Leaves;

/* One step of some streams: 32 symbols each. The streams advance side by side, instruction by instruction: their chains
 * are long, and a processor looks only so far ahead for work that does not wait. `lanes` are those that exist. */
#define EACH _Pragma("GCC unroll 4") for (int v = 0; v < streams; v++)

INLINE void decode_step(
    const int streams, __m512i *hi, __m512i *lo, const uint16_t **words, const uint32_t *planes,
    ptrdiff_t plane_stride, int16_t *out, ptrdiff_t stride, const Leaves *leaves, const int depth, const int low_bits,
    const int is_part, __mmask32 lanes)
{
    const __m512i one = _mm512_set1_epi16(1);
    const __m512i slot_bits = _mm512_set1_epi16(TOTAL - 1);
    __m512i slot[SIDE], node[SIDE], scaled[SIDE], upper[SIDE], lower[SIDE], added[SIDE];
    __mmask32 due[SIDE];
    EACH slot[v] = _mm512_and_si512(lo[v], slot_bits);
    EACH node[v] = _mm512_shldi_epi16(one, _mm512_sub_epi16(leaves->root, slot[v]), 1);
#pragma GCC unroll 5
    for (int level = 1; level < depth; level++) {
        EACH added[v] = _mm512_permutexvar_epi16(node[v], leaves->tree);
        EACH added[v] = _mm512_sub_epi16(added[v], slot[v]);
        EACH node[v] = _mm512_shldi_epi16(node[v], added[v], 1);
    }
    EACH scaled[v] = _mm512_permutexvar_epi16(node[v], leaves->scaled);
    EACH slot[v] = _mm512_sub_epi16(slot[v], _mm512_permutexvar_epi16(node[v], leaves->start));
    /* frequency * (state >> 12) + rest, by halves; scaled * low half does not overflow with rest added */
    EACH added[v] = _mm512_mulhi_epu16(scaled[v], _mm512_andnot_si512(slot_bits, lo[v]));
    EACH lower[v] = _mm512_mullo_epi16(scaled[v], hi[v]);
    EACH upper[v] = _mm512_mulhi_epu16(scaled[v], hi[v]);
    EACH added[v] = _mm512_add_epi16(added[v], slot[v]);
    EACH lower[v] = _mm512_add_epi16(lower[v], added[v]);
    EACH due[v] = _mm512_cmplt_epu16_mask(lower[v], added[v]);
    EACH upper[v] = _mm512_mask_add_epi16(upper[v], due[v], upper[v], one);
    EACH due[v] = _mm512_testn_epi16_mask(upper[v], upper[v]);
    if (is_part)
        EACH due[v] &= lanes;
    EACH upper[v] = _mm512_mask_mov_epi16(upper[v], due[v], lower[v]);
    EACH lower[v] = _mm512_mask_expand_epi16(lower[v], due[v], LOAD(words[v]));
    EACH words[v] += _mm_popcnt_u32(due[v]);
    if (is_part) {
        EACH hi[v] = _mm512_mask_mov_epi16(hi[v], lanes, upper[v]);
        EACH lo[v] = _mm512_mask_mov_epi16(lo[v], lanes, lower[v]);
    } else {
        EACH hi[v] = upper[v];
        EACH lo[v] = lower[v];
    }
    for (int bit = low_bits - 1; bit >= 0; bit--) {
        EACH node[v] = _mm512_add_epi16(node[v], node[v]);
        EACH node[v] = _mm512_mask_add_epi16(node[v], planes[v * plane_stride + bit], node[v], one);
    }
    EACH node[v] = _mm512_add_epi16(node[v], leaves->offset);
    if (is_part)
        EACH _mm512_mask_storeu_epi16(out + v * stride, lanes, node[v]);
    else
        EACH _mm512_storeu_si512(out + v * stride, node[v]);
}

INLINE Leaves leaves_of(const Table *t)
{
    return (Leaves){
        .tree = LOAD(t->tree),
        .scaled = LOAD(t->scaled),
        .start = LOAD(t->leaf_start),
        .root = _mm512_set1_epi16((short)t->tree[1]),
        .offset = _mm512_set1_epi16((short)(t->base - (int32_t)((1u << t->depth) << t->low_bits))),
    };
}

INLINE void decode_groups(
    const int streams, const int depth, const int low_bits, const Block *b, const uint16_t **words,
    const uint32_t *planes, int16_t *out, int groups)
{
    const Leaves leaves = leaves_of(b->table);
    const uint16_t *at[MAX_STREAMS];
    __m512i hi[MAX_STREAMS], lo[MAX_STREAMS];
#pragma GCC unroll 8
    for (int v = 0; v < streams; v++) {
        at[v] = words[v];
        hi[v] = LOAD(b->states[v].hi);
        lo[v] = LOAD(b->states[v].lo);
    }
    /* in two halves of about the same size */
    const int first = streams > SIDE ? (streams + 1) / 2 : streams;
    for (int g = 0; g < groups; g++) {
        const uint32_t *p = planes + g * low_bits;
        int16_t *o = out + g * LANES;
        decode_step(first, hi, lo, at, p, b->plane_stride, o, b->stride, &leaves, depth, low_bits, 0, 0);
        if (streams > first)
            decode_step(
                streams - first, hi + first, lo + first, at + first, p + first * b->plane_stride, b->plane_stride,
                o + first * b->stride, b->stride, &leaves, depth, low_bits, 0, 0);
    }
#pragma GCC unroll 8
    for (int v = 0; v < streams; v++) {
        words[v] = at[v];
        _mm512_storeu_si512(b->states[v].hi, hi[v]);
        _mm512_storeu_si512(b->states[v].lo, lo[v]);
    }
}

/* Depth and raw bits are the same for a whole channel, so each common pair has its own loop. */
#define CASE(DEPTH, LOW_BITS) \
    case (DEPTH) + 8 * (LOW_BITS): \
        return decode_groups(n, DEPTH, LOW_BITS, b, words, planes, out, groups);

INLINE void decode_by_shape(
    const int n, const Block *b, const uint16_t **words, const uint32_t *planes, int16_t *out, int groups)
{
    switch (b->table->depth + 8 * b->table->low_bits) {
        CASE(1, 0)
        CASE(2, 0)
        CASE(3, 0)
        CASE(4, 0)
        CASE(5, 0)
        CASE(5, 1)
        CASE(5, 2)
        CASE(5, 3)
    default:
        return decode_groups(n, 5, b->table->low_bits, b, words, planes, out, groups);
    }
}

#define DECODE(N) \
    static __attribute__((noinline)) void decode_##N( \
        const Block *b, const uint16_t **words, const uint32_t *planes, int16_t *out, int groups) \
    { \
        decode_by_shape(N, b, words, planes, out, groups); \
    }
DECODE(1)
DECODE(2)
DECODE(3)
DECODE(4)
DECODE(5)
DECODE(6)
DECODE(7)
DECODE(8)

static void decode(
    int streams, const Block *b, const uint16_t **words, const uint32_t *planes, int16_t *out, int groups)
{
    static void (*const by_streams[])(const Block *, const uint16_t **, const uint32_t *, int16_t *, int) = {
        0, decode_1, decode_2, decode_3, decode_4, decode_5, decode_6, decode_7, decode_8,
    };
    by_streams[streams](b, words, planes, out, groups);
}

static void decode_part(const Block *b, const uint16_t **words, const uint32_t *planes, int16_t *out, int count)
{
    const Leaves leaves = leaves_of(b->table);
    const __mmask32 lanes = _bzhi_u32(~0u, (unsigned)count);
    __m512i hi = LOAD(b->states->hi), lo = LOAD(b->states->lo);
    decode_step(1, &hi, &lo, words, planes, 0, out, 0, &leaves, b->table->depth, b->table->low_bits, 1, lanes);
    _mm512_storeu_si512(b->states->hi, hi);
    _mm512_storeu_si512(b->states->lo, lo);
}

typedef struct {
    __m512i frequency, start, whole, part, base, escape, low_bits;
} Rates;

INLINE Rates rates_of(const Table *t)
{
    return (Rates){
        .frequency = LOAD(t->frequency),
        .start = LOAD(t->start),
        .whole = LOAD(t->whole),
        .part = LOAD(t->part),
        .base = _mm512_set1_epi16((short)t->base),
        .escape = _mm512_set1_epi16((short)(t->escape < 0 ? SYMBOLS - 1 : t->escape)),
        .low_bits = _mm512_set1_epi16((short)t->low_bits),
    };
}

INLINE void encode_step(
    const int streams, __m512i *hi_at, __m512i *lo_at, uint16_t **words, uint32_t *planes, ptrdiff_t plane_stride,
    const int16_t *in, ptrdiff_t stride, const Rates *rates, const int low_bits, const int is_part, __mmask32 lanes)
{
    const __m512i one = _mm512_set1_epi16(1);
    __m512i hi[SIDE], lo[SIDE], symbol[SIDE], frequency[SIDE], whole[SIDE], top[SIDE], digit[SIDE];
    __mmask32 due[SIDE];
    EACH symbol[v] = is_part ? _mm512_mask_loadu_epi16(rates->base, lanes, in) : LOAD(in + v * stride);
    EACH symbol[v] = _mm512_sub_epi16(symbol[v], rates->base);
    for (int bit = 0; bit < low_bits; bit++)
        EACH planes[v * plane_stride + bit] =
            _mm512_test_epi16_mask(symbol[v], _mm512_set1_epi16((short)(1 << bit)));
    if (low_bits)
        EACH symbol[v] = _mm512_srlv_epi16(symbol[v], rates->low_bits);
    EACH symbol[v] = _mm512_min_epu16(symbol[v], rates->escape);
    EACH frequency[v] = _mm512_permutexvar_epi16(symbol[v], rates->frequency);
    EACH whole[v] = _mm512_permutexvar_epi16(symbol[v], rates->whole);

    /* a word leaves each state that would grow beyond 32 bits */
    EACH due[v] = _mm512_cmpge_epu16_mask(hi_at[v], _mm512_slli_epi16(frequency[v], 4));
    if (is_part)
        EACH due[v] &= lanes;
    EACH
    {
        const unsigned count = (unsigned)_mm_popcnt_u32(due[v]);
        words[v] -= count;
        _mm512_mask_storeu_epi16(words[v], _bzhi_u32(~0u, count), _mm512_maskz_compress_epi16(due[v], lo_at[v]));
    }
    EACH lo[v] = _mm512_mask_mov_epi16(lo_at[v], due[v], hi_at[v]);
    EACH hi[v] = _mm512_mask_sub_epi16(hi_at[v], due[v], hi_at[v], hi_at[v]);

    /* quotient of 20 bits in two digits. The first estimate is at most 1 too small: hi < 16 * frequency */
    EACH top[v] = _mm512_mulhi_epu16(hi[v], whole[v]);
    EACH hi[v] = _mm512_sub_epi16(hi[v], _mm512_mullo_epi16(top[v], frequency[v]));
    EACH due[v] = _mm512_cmpge_epu16_mask(hi[v], frequency[v]);
    EACH hi[v] = _mm512_mask_sub_epi16(hi[v], due[v], hi[v], frequency[v]);
    EACH top[v] = _mm512_mask_add_epi16(top[v], due[v], top[v], one);
    /* the second at most 3 too small: three products are rounded down; 4 * frequency fits 16 bits */
    EACH digit[v] = _mm512_mulhi_epu16(hi[v], _mm512_permutexvar_epi16(symbol[v], rates->part));
    EACH hi[v] = _mm512_mullo_epi16(hi[v], whole[v]);
    EACH whole[v] = _mm512_mulhi_epu16(lo[v], whole[v]);
    EACH digit[v] = _mm512_add_epi16(_mm512_add_epi16(hi[v], digit[v]), whole[v]);
    EACH lo[v] = _mm512_sub_epi16(lo[v], _mm512_mullo_epi16(digit[v], frequency[v]));
    EACH hi[v] = _mm512_add_epi16(frequency[v], frequency[v]);
    EACH due[v] = _mm512_cmpge_epu16_mask(lo[v], hi[v]);
    EACH lo[v] = _mm512_mask_sub_epi16(lo[v], due[v], lo[v], hi[v]);
    EACH digit[v] = _mm512_mask_add_epi16(digit[v], due[v], digit[v], _mm512_set1_epi16(2));
    EACH due[v] = _mm512_cmpge_epu16_mask(lo[v], frequency[v]);
    EACH lo[v] = _mm512_mask_sub_epi16(lo[v], due[v], lo[v], frequency[v]);
    EACH digit[v] = _mm512_mask_add_epi16(digit[v], due[v], digit[v], one);

    /* quotient << 12 | rest + start */
    EACH hi[v] = _mm512_shrdi_epi16(digit[v], top[v], 4);
    EACH lo[v] = _mm512_add_epi16(lo[v], _mm512_permutexvar_epi16(symbol[v], rates->start));
    EACH lo[v] = _mm512_add_epi16(lo[v], _mm512_slli_epi16(digit[v], 12));
    if (is_part) {
        EACH hi_at[v] = _mm512_mask_mov_epi16(hi_at[v], lanes, hi[v]);
        EACH lo_at[v] = _mm512_mask_mov_epi16(lo_at[v], lanes, lo[v]);
    } else {
        EACH hi_at[v] = hi[v];
        EACH lo_at[v] = lo[v];
    }
}

INLINE void encode_groups(
    const int streams, const int low_bits, const Block *b, uint16_t **words, uint32_t *planes, const int16_t *in,
    int groups)
{
    const Rates rates = rates_of(b->table);
    uint16_t *at[MAX_STREAMS];
    __m512i hi[MAX_STREAMS], lo[MAX_STREAMS];
#pragma GCC unroll 8
    for (int v = 0; v < streams; v++) {
        at[v] = words[v];
        hi[v] = LOAD(b->states[v].hi);
        lo[v] = LOAD(b->states[v].lo);
    }
    const int first = streams > SIDE ? (streams + 1) / 2 : streams;
    for (int g = groups - 1; g >= 0; g--) {
        uint32_t *p = planes + g * low_bits;
        const int16_t *i = in + g * LANES;
        encode_step(first, hi, lo, at, p, b->plane_stride, i, b->stride, &rates, low_bits, 0, 0);
        if (streams > first)
            encode_step(
                streams - first, hi + first, lo + first, at + first, p + first * b->plane_stride, b->plane_stride,
                i + first * b->stride, b->stride, &rates, low_bits, 0, 0);
    }
#pragma GCC unroll 8
    for (int v = 0; v < streams; v++) {
        words[v] = at[v];
        _mm512_storeu_si512(b->states[v].hi, hi[v]);
        _mm512_storeu_si512(b->states[v].lo, lo[v]);
    }
}

INLINE void encode_by_shape(
    const int n, const Block *b, uint16_t **words, uint32_t *planes, const int16_t *in, int groups)
{
    switch (b->table->low_bits) {
    case 0:
        return encode_groups(n, 0, b, words, planes, in, groups);
    case 1:
        return encode_groups(n, 1, b, words, planes, in, groups);
    case 2:
        return encode_groups(n, 2, b, words, planes, in, groups);
    case 3:
        return encode_groups(n, 3, b, words, planes, in, groups);
    default:
        return encode_groups(n, b->table->low_bits, b, words, planes, in, groups);
    }
}

#define ENCODE(N) \
    static __attribute__((noinline)) void encode_##N( \
        const Block *b, uint16_t **words, uint32_t *planes, const int16_t *in, int groups) \
    { \
        encode_by_shape(N, b, words, planes, in, groups); \
    }
ENCODE(1)
ENCODE(2)
ENCODE(3)
ENCODE(4)
ENCODE(5)
ENCODE(6)
ENCODE(7)
ENCODE(8)

static void encode(int streams, const Block *b, uint16_t **words, uint32_t *planes, const int16_t *in, int groups)
{
    static void (*const by_streams[])(const Block *, uint16_t **, uint32_t *, const int16_t *, int) = {
        0, encode_1, encode_2, encode_3, encode_4, encode_5, encode_6, encode_7, encode_8,
    };
    by_streams[streams](b, words, planes, in, groups);
}

static void encode_part(const Block *b, uint16_t **words, uint32_t *planes, const int16_t *in, int count)
{
    const Rates rates = rates_of(b->table);
    const __mmask32 lanes = _bzhi_u32(~0u, (unsigned)count);
    __m512i hi = LOAD(b->states->hi), lo = LOAD(b->states->lo);
    encode_step(1, &hi, &lo, words, planes, 0, in, 0, &rates, b->table->low_bits, 1, lanes);
    _mm512_storeu_si512(b->states->hi, hi);
    _mm512_storeu_si512(b->states->lo, lo);
}

static int64_t escapes(const int16_t *row, int64_t tokens, const Table *t, int16_t *out)
{
    const __m512i base = _mm512_set1_epi16((short)t->base);
    const __m512i span = _mm512_set1_epi16((short)t->span);
    int64_t count = 0;
    for (int64_t i = 0; i < tokens; i += LANES) {
        const int64_t left = tokens - i;
        const __mmask32 lanes = left < LANES ? _bzhi_u32(~0u, (unsigned)left) : ~0u;
        const __m512i values = _mm512_maskz_loadu_epi16(lanes, row + i);
        __mmask32 outside = _mm512_cmpge_epu16_mask(_mm512_sub_epi16(values, base), span);
        outside |= _mm512_cmplt_epi16_mask(values, base);
        outside &= lanes;
        if (outside) {
            const unsigned n = (unsigned)_mm_popcnt_u32(outside);
            _mm512_mask_storeu_epi16(out + count, _bzhi_u32(~0u, n), _mm512_maskz_compress_epi16(outside, values));
            count += n;
        }
    }
    return count;
}

static int64_t restore(int16_t *row, int64_t tokens, const Table *t, const int16_t *escapes_at, int64_t left)
{
    const __m512i base = _mm512_set1_epi16((short)t->base);
    const __m512i span = _mm512_set1_epi16((short)t->span);
    int64_t count = 0;
    for (int64_t i = 0; i < tokens; i += LANES) {
        const __mmask32 lanes = tokens - i < LANES ? _bzhi_u32(~0u, (unsigned)(tokens - i)) : ~0u;
        const __m512i values = _mm512_maskz_loadu_epi16(lanes, row + i);
        const __mmask32 outside = _mm512_cmpge_epu16_mask(_mm512_sub_epi16(values, base), span) & lanes;
        if (outside) {
            const int64_t n = _mm_popcnt_u32(outside);
            if (n <= left - count) {
                const __m512i taken = _mm512_maskz_loadu_epi16(_bzhi_u32(~0u, (unsigned)n), escapes_at + count);
                _mm512_mask_storeu_epi16(row + i, outside, _mm512_maskz_expand_epi16(outside, taken));
            }
            count += n;
        }
    }
    return count;
}

/* 64 magnitudes in bytes: those above 127 become 127, and that of -32768 becomes 128. */
INLINE __m512i magnitudes_of(const int16_t *row)
{
    return _mm512_packs_epi16(_mm512_abs_epi16(LOAD(row)), _mm512_abs_epi16(LOAD(row + LANES)));
}

INLINE __m512i last_magnitudes_of(const int16_t *row, int64_t left)
{
    const __mmask64 lanes = _bzhi_u64(~0ull, (unsigned)left);
    return _mm512_packs_epi16(
        _mm512_abs_epi16(_mm512_maskz_loadu_epi16((__mmask32)lanes, row)),
        _mm512_abs_epi16(_mm512_maskz_loadu_epi16((__mmask32)(lanes >> LANES), row + LANES)));
}

/* Add how many are at least each of four bins' least magnitude, which must be below 128. Returns the largest. */
INLINE __m512i count_bytes(const int16_t *row, int64_t tokens, const int first, int64_t at_least[])
{
    __m512i largest = _mm512_setzero_si512();
    __m512i bounds[4];
    int64_t counts[4] = {0};
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++)
        bounds[k] = _mm512_set1_epi8((char)least_magnitudes[first + k]);
    for (int64_t i = 0; i < tokens; i += 2 * LANES) {
        const __m512i m =
            tokens - i < 2 * LANES ? last_magnitudes_of(row + i, tokens - i) : magnitudes_of(row + i);
        largest = _mm512_max_epu8(largest, m);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++)
            counts[k] += (int64_t)_mm_popcnt_u64(_mm512_cmpge_epu8_mask(m, bounds[k]));
    }
    for (int k = 0; k < 4; k++)
        at_least[first + k] = counts[k];
    return largest;
}

/* As row_bins. Most channels end after the first pass or two. */
static int bins_of(const int16_t *row, int64_t tokens, int64_t at_least[2 * BIN_PAIRS + 1])
{
    memset(at_least, 0, (2 * BIN_PAIRS + 1) * sizeof *at_least);
    at_least[0] = tokens;
    const __m512i largest = count_bytes(row, tokens, 1, at_least);
    if (_mm512_cmpge_epu8_mask(largest, _mm512_set1_epi8(6)))
        count_bytes(row, tokens, 5, at_least);
    for (int first = 9; first < BINS && (first == 9 ? 1 : at_least[first - 1] > 0); first += 4) {
        if (first == 9 && !_mm512_cmpge_epu8_mask(largest, _mm512_set1_epi8(32)))
            break;
        for (int64_t i = 0; i < tokens; i += LANES) {
            const __mmask32 lanes = tokens - i < LANES ? _bzhi_u32(~0u, (unsigned)(tokens - i)) : ~0u;
            const __m512i a = _mm512_abs_epi16(_mm512_maskz_loadu_epi16(lanes, row + i));
            for (int k = first; k < first + 4; k++)
                at_least[k] +=
                    _mm_popcnt_u32(_mm512_cmpge_epu16_mask(a, _mm512_set1_epi16((short)least_magnitudes[k])));
        }
    }
    int bins = 1;
    while (bins < BINS && at_least[bins] > 0)
        bins++;
    return bins;
}

/* As row_choose. */
static int choose(const int16_t *row, int64_t tokens, const Prices *prices, int after)
{
    int64_t at_least[2 * BIN_PAIRS + 1];
    int16_t counts[2 * BIN_PAIRS];
    __m512i cost[TABLES / 16];
    const int bins = bins_of(row, tokens, at_least);
    if (bins == 1)
        return 0;
    const int shift = bin_counts(tokens, at_least, counts);
    const int blocks = (prices->count + 15) / 16;
    __m512i least = _mm512_set1_epi32(INT32_MAX);
    for (int block = 0; block < blocks; block++) {
        __m512i sum = _mm512_setzero_si512();
        for (int pair = 0; 2 * pair < bins; pair++) {
            int32_t both;
            memcpy(&both, counts + 2 * pair, sizeof both);
            sum = _mm512_add_epi32(
                sum, _mm512_madd_epi16(LOAD(prices->lengths[pair][16 * block]), _mm512_set1_epi32(both)));
        }
        /* table 0 is for zeros only */
        if (block == 0)
            sum = _mm512_mask_mov_epi32(sum, 1, _mm512_set1_epi32(INT32_MAX));
        cost[block] = sum;
        least = _mm512_min_epi32(least, sum);
    }
    const int32_t lowest = _mm512_reduce_min_epi32(least);
    int32_t kept;
    memcpy(&kept, (const int32_t *)cost + after, sizeof kept);
    if (after > 0 && kept <= lowest + (prices->keep >> shift))
        return after;
    for (int block = 0;; block++) {
        const __mmask16 equal = _mm512_cmpeq_epi32_mask(cost[block], _mm512_set1_epi32(lowest));
        if (equal)
            return 16 * block + (int)_tzcnt_u32(equal);
    }
}

const Level kvserve_avx512 = {
    .decode = decode,
    .decode_part = decode_part,
    .encode = encode,
    .encode_part = encode_part,
    .escapes = escapes,
    .restore = restore,
    .choose = choose,
};
#pragma GCC pop_options
#endif
