/* rANS one symbol at a time, for every processor; what the wide implementations must agree with. */
#include "rans.h"
#include "rows.h"

#define INLINE static inline __attribute__((always_inline))

INLINE void decode_lanes(
    const Block *b, State *state, const uint16_t **words, const uint32_t *planes, int16_t *out, const int count)
{
    const Table *t = b->table;
    const uint16_t *at = *words;
    const int low_bits = t->low_bits;
    for (int lane = 0; lane < count; lane++) {
        uint32_t x = (uint32_t)state->hi[lane] << 16 | state->lo[lane];
        uint32_t entry = b->slots[x & (TOTAL - 1)];
        uint32_t value = entry & 0xff;
        for (int bit = low_bits - 1; bit >= 0; bit--)
            value = value << 1 | (planes[bit] >> lane & 1);
        out[lane] = (int16_t)(uint16_t)(value + (uint32_t)t->base);
        x = ((entry >> 20) + 1) * (x >> 12) + (entry >> 8 & (TOTAL - 1));
        /* read in any case and kept if due: a branch here would be mispredicted all the time */
        uint32_t due = x < LOWER;
        x = due ? x << 16 | *at : x;
        at += due;
        state->hi[lane] = (uint16_t)(x >> 16);
        state->lo[lane] = (uint16_t)x;
    }
    *words = at;
}

void kvserve_decode_part(const Block *b, const uint16_t **words, const uint32_t *planes, int16_t *out, int count)
{
    decode_lanes(b, b->states, words, planes, out, count);
}

static void decode(
    int streams, const Block *b, const uint16_t **words, const uint32_t *planes, int16_t *out, int groups)
{
    const int low_bits = b->table->low_bits;
    for (int v = 0; v < streams; v++)
        for (int g = 0; g < groups; g++)
            decode_lanes(
                b, &b->states[v], &words[v], planes + v * b->plane_stride + g * low_bits,
                out + v * b->stride + g * LANES, LANES);
}

INLINE void encode_lanes(
    const Block *b, State *state, uint16_t **words, uint32_t *planes, const int16_t *in, const int count)
{
    const Table *t = b->table;
    uint16_t *at = *words;
    const int low_bits = t->low_bits;
    for (int bit = 0; bit < low_bits; bit++) {
        uint32_t word = 0;
        for (int lane = 0; lane < count; lane++)
            word |= ((uint32_t)(in[lane] - t->base) >> bit & 1) << lane;
        planes[bit] = word;
    }
    for (int lane = count - 1; lane >= 0; lane--) {
        int s = is_outside(t, in[lane]) ? t->outside : (in[lane] - t->base) >> low_bits & (SYMBOLS - 1);
        uint32_t f = t->frequency[s];
        uint32_t x = (uint32_t)state->hi[lane] << 16 | state->lo[lane];
        at[-1] = (uint16_t)x;
        uint32_t due = x >> 20 >= f;
        at -= due;
        x >>= due * 16;
        /* exact, because x is below f << 20 */
        uint32_t q = (uint32_t)((uint64_t)x * t->reciprocal[s] >> 44);
        x += t->start[s] + q * (TOTAL - f);
        state->hi[lane] = (uint16_t)(x >> 16);
        state->lo[lane] = (uint16_t)x;
    }
    *words = at;
}

void kvserve_encode_part(const Block *b, uint16_t **words, uint32_t *planes, const int16_t *in, int count)
{
    encode_lanes(b, b->states, words, planes, in, count);
}

static void encode(int streams, const Block *b, uint16_t **words, uint32_t *planes, const int16_t *in, int groups)
{
    const int low_bits = b->table->low_bits;
    for (int v = 0; v < streams; v++)
        for (int g = groups - 1; g >= 0; g--)
            encode_lanes(
                b, &b->states[v], &words[v], planes + v * b->plane_stride + g * low_bits,
                in + v * b->stride + g * LANES, LANES);
}

const Level kvserve_portable = {
    .decode = decode,
    .decode_part = kvserve_decode_part,
    .encode = encode,
    .encode_part = kvserve_encode_part,
    .escapes = row_escapes,
    .restore = row_restore,
    .choose = row_choose,
};
