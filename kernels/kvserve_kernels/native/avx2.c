/* rANS with AVX2: a stream's 32 states are four vectors of eight, slots and rates are gathered. */
#if defined(__x86_64__) && !defined(KVSERVE_PORTABLE_ONLY)
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,popcnt,lzcnt")
#include <immintrin.h>

#include "rans.h"
#include "rows.h"

#define INLINE static inline __attribute__((always_inline))

/* By mask of eight lanes: for each lane the word that it takes, and for each place from the end the lane it is of. */
static uint32_t spread[256][8];
static uint32_t gathered[256][8];

static __attribute__((constructor)) void fill(void)
{
    for (int mask = 0; mask < 256; mask++) {
        uint32_t count = 0, total = (uint32_t)__builtin_popcount((unsigned)mask);
        for (uint32_t lane = 0; lane < 8; lane++)
            if (mask >> lane & 1) {
                spread[mask][lane] = count;
                gathered[mask][8 - total + count] = lane;
                count++;
            }
    }
}

INLINE __m256i joined(const uint16_t *hi, const uint16_t *lo)
{
    __m256i h = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)hi));
    __m256i l = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)lo));
    return _mm256_or_si256(_mm256_slli_epi32(h, 16), l);
}

/* The low halves of eight numbers below 2^16. */
INLINE __m128i halves(__m256i x)
{
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 0x08));
}

INLINE void parted(uint16_t *hi, uint16_t *lo, __m256i x)
{
    _mm_storeu_si128((void *)hi, halves(_mm256_srli_epi32(x, 16)));
    _mm_storeu_si128((void *)lo, halves(_mm256_and_si256(x, _mm256_set1_epi32(0xffff))));
}

INLINE void decode_step(
    __m256i x[4], const uint16_t **words, const uint32_t *planes, int16_t *out, const Block *b, const int low_bits)
{
    const __m256i slot_bits = _mm256_set1_epi32(TOTAL - 1);
    const __m256i lane_bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i base = _mm256_set1_epi32(b->table->base);
    __m256i value[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
        __m256i entry =
            _mm256_i32gather_epi32((const int *)b->slots, _mm256_and_si256(x[v], slot_bits), 4);
        __m256i f = _mm256_add_epi32(_mm256_srli_epi32(entry, 20), _mm256_set1_epi32(1));
        __m256i y = _mm256_add_epi32(
            _mm256_mullo_epi32(f, _mm256_srli_epi32(x[v], 12)),
            _mm256_and_si256(_mm256_srli_epi32(entry, 8), slot_bits));
        __m256i due = _mm256_cmpeq_epi32(_mm256_srli_epi32(y, 16), _mm256_setzero_si256());
        unsigned mask = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(due));
        __m256i word = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)*words));
        word = _mm256_permutevar8x32_epi32(word, _mm256_loadu_si256((const void *)spread[mask]));
        x[v] = _mm256_blendv_epi8(y, _mm256_or_si256(_mm256_slli_epi32(y, 16), word), due);
        *words += _mm_popcnt_u32(mask);
        __m256i symbol = _mm256_and_si256(entry, _mm256_set1_epi32(0xff));
        for (int bit = low_bits - 1; bit >= 0; bit--) {
            __m256i lanes = _mm256_and_si256(_mm256_set1_epi32((int)(planes[bit] >> (8 * v))), lane_bits);
            __m256i set = _mm256_cmpeq_epi32(lanes, lane_bits);
            symbol = _mm256_sub_epi32(_mm256_add_epi32(symbol, symbol), set);
        }
        /* to 16 bits without saturation: a sum may wrap */
        value[v] = _mm256_and_si256(_mm256_add_epi32(symbol, base), _mm256_set1_epi32(0xffff));
    }
#pragma GCC unroll 2
    for (int v = 0; v < 4; v += 2) {
        __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(value[v], value[v + 1]), 0xd8);
        _mm256_storeu_si256((void *)(out + 8 * v), both);
    }
}

INLINE void decode_groups(
    const int streams, const int low_bits, const Block *b, State *state, const uint16_t **words,
    const uint32_t *planes, int16_t *out, int groups)
{
    __m256i x[2][4];
    const uint16_t *at[2];
#pragma GCC unroll 2
    for (int v = 0; v < streams; v++) {
        at[v] = words[v];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            x[v][i] = joined(state[v].hi + 8 * i, state[v].lo + 8 * i);
    }
    for (int g = 0; g < groups; g++) {
#pragma GCC unroll 2
        for (int v = 0; v < streams; v++)
            decode_step(
                x[v], &at[v], planes + v * b->plane_stride + g * low_bits, out + v * b->stride + g * LANES, b,
                low_bits);
    }
#pragma GCC unroll 2
    for (int v = 0; v < streams; v++) {
        words[v] = at[v];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            parted(state[v].hi + 8 * i, state[v].lo + 8 * i, x[v][i]);
    }
}

static void decode(
    int streams, const Block *b, const uint16_t **words, const uint32_t *planes, int16_t *out, int groups)
{
    const int low_bits = b->table->low_bits;
    for (int v = 0; v < streams; v += 2) {
        const uint32_t *p = planes + v * b->plane_stride;
        int16_t *o = out + v * b->stride;
        if (streams - v == 1)
            decode_groups(1, low_bits, b, b->states + v, words + v, p, o, groups);
        else if (low_bits > 0)
            decode_groups(2, low_bits, b, b->states + v, words + v, p, o, groups);
        else
            decode_groups(2, 0, b, b->states + v, words + v, p, o, groups);
    }
}

INLINE void encode_step(
    __m256i x[4], uint16_t **words, uint32_t *planes, const int16_t *in, const Table *t, const int low_bits)
{
    const __m256i base = _mm256_set1_epi32(t->base);
    const __m256i span = _mm256_set1_epi32(t->span - 1);
    const __m256i escape = _mm256_set1_epi32(t->outside);
    uint32_t plane[16] = {0};
#pragma GCC unroll 4
    for (int v = 3; v >= 0; v--) {
        __m256i distance =
            _mm256_sub_epi32(_mm256_cvtepi16_epi32(_mm_loadu_si128((const void *)(in + 8 * v))), base);
        for (int bit = 0; bit < low_bits; bit++) {
            __m256i top = _mm256_slli_epi32(distance, 31 - bit);
            plane[bit] |= (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(top)) << (8 * v);
        }
        __m256i outside = _mm256_or_si256(
            _mm256_cmpgt_epi32(_mm256_setzero_si256(), distance), _mm256_cmpgt_epi32(distance, span));
        __m256i symbol = _mm256_blendv_epi8(_mm256_srai_epi32(distance, low_bits), escape, outside);
        symbol = _mm256_and_si256(symbol, _mm256_set1_epi32(SYMBOLS - 1));
        __m256i pair = _mm256_i32gather_epi32((const int *)t->pair, symbol, 4);
        __m256 inverse = _mm256_i32gather_ps(t->inverse, symbol, 4);
        __m256i f = _mm256_and_si256(pair, _mm256_set1_epi32(0xffff));
        __m256i start = _mm256_srli_epi32(pair, 16);

        /* x >> 20 >= frequency */
        __m256i due = _mm256_cmpgt_epi32(f, _mm256_srli_epi32(x[v], 20));
        unsigned mask = ~(unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(due)) & 0xff;
        __m256i word = _mm256_and_si256(x[v], _mm256_set1_epi32(0xffff));
        word = _mm256_permutevar8x32_epi32(word, _mm256_loadu_si256((const void *)gathered[mask]));
        /* eight words, of which the last count; those below are written over later */
        _mm_storeu_si128((void *)(*words - 8), halves(word));
        *words -= _mm_popcnt_u32(mask);
        __m256i kept = _mm256_blendv_epi8(_mm256_srli_epi32(x[v], 16), x[v], due);

        /* the quotient of 20 bits from 24 bits of precision is at most 1 too small: `inverse` is below 1 / frequency
         * by more than what rounding adds. Conversion is signed, so the halves are converted apart. */
        __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(kept, 16));
        __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(kept, _mm256_set1_epi32(0xffff)));
        __m256 real = _mm256_add_ps(_mm256_mul_ps(high, _mm256_set1_ps(65536.0f)), low);
        __m256i q = _mm256_cvttps_epi32(_mm256_mul_ps(real, inverse));
        __m256i rest = _mm256_sub_epi32(kept, _mm256_mullo_epi32(q, f));
        __m256i short_by_one = _mm256_cmpgt_epi32(rest, _mm256_sub_epi32(f, _mm256_set1_epi32(1)));
        rest = _mm256_add_epi32(
            rest, _mm256_and_si256(short_by_one, _mm256_sub_epi32(_mm256_set1_epi32(TOTAL), f)));
        x[v] = _mm256_add_epi32(_mm256_slli_epi32(q, 12), _mm256_add_epi32(rest, start));
    }
    for (int bit = 0; bit < low_bits; bit++)
        planes[bit] = plane[bit];
}

INLINE void encode_groups(
    const int streams, const int low_bits, const Block *b, State *state, uint16_t **words, uint32_t *planes,
    const int16_t *in, int groups)
{
    __m256i x[2][4];
    uint16_t *at[2];
#pragma GCC unroll 2
    for (int v = 0; v < streams; v++) {
        at[v] = words[v];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            x[v][i] = joined(state[v].hi + 8 * i, state[v].lo + 8 * i);
    }
    for (int g = groups - 1; g >= 0; g--) {
#pragma GCC unroll 2
        for (int v = 0; v < streams; v++)
            encode_step(
                x[v], &at[v], planes + v * b->plane_stride + g * low_bits, in + v * b->stride + g * LANES, b->table,
                low_bits);
    }
#pragma GCC unroll 2
    for (int v = 0; v < streams; v++) {
        words[v] = at[v];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            parted(state[v].hi + 8 * i, state[v].lo + 8 * i, x[v][i]);
    }
}

static void encode(int streams, const Block *b, uint16_t **words, uint32_t *planes, const int16_t *in, int groups)
{
    const int low_bits = b->table->low_bits;
    for (int v = 0; v < streams; v += 2) {
        uint32_t *p = planes + v * b->plane_stride;
        const int16_t *i = in + v * b->stride;
        if (streams - v == 1)
            encode_groups(1, low_bits, b, b->states + v, words + v, p, i, groups);
        else if (low_bits > 0)
            encode_groups(2, low_bits, b, b->states + v, words + v, p, i, groups);
        else
            encode_groups(2, 0, b, b->states + v, words + v, p, i, groups);
    }
}

const Level kvserve_avx2 = {
    .decode = decode,
    .decode_part = kvserve_decode_part,
    .encode = encode,
    .encode_part = kvserve_encode_part,
    .escapes = row_escapes,
    .restore = row_restore,
    .choose = row_choose,
};
#pragma GCC pop_options
#endif
