/* Whole matrices: streams in flight, partial groups, the bounds of what may be read, escapes. */
#include <stdlib.h>

#include "rans.h"

enum { PORTABLE, AVX2, AVX512, LEVELS };

static const Level *level_of(int level)
{
#if defined(__x86_64__) && !defined(KVSERVE_PORTABLE_ONLY)
    if (level == AVX512)
        return &kvserve_avx512;
    if (level == AVX2)
        return &kvserve_avx2;
#endif
    (void)level;
    return &kvserve_portable;
}

/* The widest instruction set of this processor that there is code for. */
int kvserve_widest(void)
{
#if defined(__x86_64__) && !defined(KVSERVE_PORTABLE_ONLY)
    __builtin_cpu_init();
    int narrow = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                 __builtin_cpu_supports("popcnt");
    if (narrow && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2"))
        return AVX512;
    if (narrow)
        return AVX2;
#endif
    return PORTABLE;
}

/* How [channels, tokens] is cut: streams of `size` groups, of which the last may be shorter and end in a part. */
typedef struct {
    int64_t tokens;
    int64_t size;    /* groups a stream */
    int64_t streams;
    int64_t batches;
    int64_t groups;  /* of a channel, the partial one included */
    int64_t short_groups; /* whole groups of the last stream */
    int part;        /* tokens of the partial group */
} Cut;

static Cut cut_of(int64_t tokens, int64_t size)
{
    Cut c;
    c.tokens = tokens;
    c.groups = (tokens + LANES - 1) / LANES;
    c.size = size < c.groups ? size : c.groups;
    c.streams = (c.groups + c.size - 1) / c.size;
    c.batches = (c.streams + MAX_STREAMS - 1) / MAX_STREAMS;
    int64_t last = tokens - (c.streams - 1) * c.size * LANES;
    c.short_groups = last / LANES;
    c.part = (int)(last % LANES);
    return c;
}

/* The lanes of a stream that are used. */
static int64_t lanes_of(const Cut *c, int64_t stream)
{
    return stream == c->streams - 1 && c->short_groups == 0 ? c->part : LANES;
}

/* A value can look as if it were inside although it is outside, where distances are taken modulo 2^16. */
static int outside_wraps(const Table *t)
{
    return t->escape >= 0 && t->base + 32768 + t->span > 65536;
}

static int64_t min(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t max(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* The planes of a channel whose symbols are not coded because they are all the same. */
static void encode_sole(const Table *t, const int16_t *row, const Cut *c, uint32_t *planes)
{
    if (t->low_bits == 0)
        return;
    memset(planes, 0, (size_t)(c->groups * t->low_bits) * sizeof *planes);
    for (int64_t i = 0; i < c->tokens; i++)
        for (int bit = 0; bit < t->low_bits; bit++)
            planes[i / LANES * t->low_bits + bit] |= ((uint32_t)(row[i] - t->base) >> bit & 1) << (i % LANES);
}

static void decode_sole(const Table *t, int16_t *row, const Cut *c, const uint32_t *planes)
{
    if (t->low_bits == 0) {
        const int16_t value = (int16_t)(uint16_t)((uint32_t)t->sole + (uint32_t)t->base);
        for (int64_t i = 0; i < c->tokens; i++)
            row[i] = value;
        return;
    }
    for (int64_t i = 0; i < c->tokens; i++) {
        uint32_t value = (uint32_t)t->sole;
        for (int bit = t->low_bits - 1; bit >= 0; bit--)
            value = value << 1 | (planes[i / LANES * t->low_bits + bit] >> (i % LANES) & 1);
        row[i] = (int16_t)(uint16_t)(value + (uint32_t)t->base);
    }
}

/* What an encoder fills: everything from its end down, because it goes through the values backwards. */
typedef struct {
    uint16_t *words;     /* for each stream `capacity`, at least 32 + the symbols that the longest one codes */
    int64_t capacity;
    uint32_t *counts;    /* for each stream its words */
    uint32_t *states;    /* the used lanes of each stream, from the start on */
    uint32_t *planes;
    int64_t plane_words; /* room, and then how many there are */
    int16_t *escapes;    /* room for all values and one channel more */
    int64_t escaped;
} Coded;

/* Code [channels, tokens] in streams of `size` groups. The table of each channel is given by `ids`, or chosen by
 * `prices` and written there; then a 0 says beforehand that a channel is all zero. */
void kvserve_encode(
    int level, const int16_t *values, int64_t channels, int64_t tokens, int64_t size, uint8_t *ids,
    const Prices *prices, const Table *tables, Coded *coded)
{
    const Level *with = level_of(level);
    const Cut c = cut_of(tokens, size);
    uint32_t *const planes_end = coded->planes + coded->plane_words;
    int16_t *const escapes_end = coded->escapes + channels * tokens + tokens;
    int after = 0;
    coded->plane_words = 0;
    coded->escaped = 0;
    for (int64_t i = 0; i < channels && !prices; i++)
        if (level == AVX512 && outside_wraps(&tables[ids[i]]))
            with = level_of(PORTABLE);

    for (int64_t batch = 0; batch < c.batches; batch++) {
        const int64_t first = c.streams * batch / c.batches;
        const int64_t stop = c.streams * (batch + 1) / c.batches;
        const int n = (int)(stop - first);
        const int is_last = stop == c.streams;
        const int64_t common = is_last ? c.short_groups : c.size;
        State lanes[MAX_STREAMS];
        uint16_t *at[MAX_STREAMS];
        for (int v = 0; v < n; v++) {
            at[v] = coded->words + (first + v + 1) * coded->capacity;
            for (int lane = 0; lane < LANES; lane++) {
                lanes[v].hi[lane] = 1;
                lanes[v].lo[lane] = 0;
            }
        }
        int64_t plane_words = 0;
        for (int64_t i = channels - 1; i >= 0; i--) {
            const int16_t *row = values + i * tokens;
            if (batch == 0 && prices) {
                after = ids[i] ? with->choose(row, tokens, prices, after) : 0;
                ids[i] = (uint8_t)after;
            }
            const Table *t = &tables[ids[i]];
            if (batch == 0 && t->escape >= 0) {
                /* found forwards, at the start of the room, which is never that full */
                const int64_t found = with->escapes(row, tokens, t, coded->escapes);
                coded->escaped += found;
                memmove(escapes_end - coded->escaped, coded->escapes, (size_t)found * sizeof *escapes_end);
            }
            plane_words += c.groups * t->low_bits;
            uint32_t *p = planes_end - plane_words;
            if (t->depth == 0) {
                if (is_last)
                    encode_sole(t, row, &c, p);
                continue;
            }
            Block b = {t, NULL, lanes, c.size * LANES, c.size * t->low_bits};
            row += first * b.stride;
            p += first * b.plane_stride;
            if (is_last && c.part > 0) {
                Block end = b;
                end.states = &lanes[n - 1];
                with->encode_part(
                    &end, &at[n - 1], p + (n - 1) * b.plane_stride + c.short_groups * t->low_bits,
                    row + (n - 1) * b.stride + c.short_groups * LANES, c.part);
            }
            if (common < c.size && n > 1)
                with->encode(n - 1, &b, at, p + common * t->low_bits, row + common * LANES, (int)(c.size - common));
            if (common > 0)
                with->encode(n, &b, at, p, row, (int)common);
        }
        coded->plane_words = plane_words;
        for (int v = 0; v < n; v++) {
            coded->counts[first + v] = (uint32_t)(coded->words + (first + v + 1) * coded->capacity - at[v]);
            for (int64_t lane = 0; lane < lanes_of(&c, first + v); lane++)
                coded->states[(first + v) * LANES + lane] = (uint32_t)lanes[v].hi[lane] << 16 | lanes[v].lo[lane];
        }
    }
}

/* 1 for each channel that is not all zero, else 0. */
void kvserve_live(const int16_t *values, int64_t channels, int64_t tokens, uint8_t *live)
{
    for (int64_t i = 0; i < channels; i++) {
        const int16_t *row = values + i * tokens;
        uint64_t any = 0;
        int64_t first = 0;
        /* most channels show it at once, so looking far ahead would be in vain */
        for (; first + LANES <= tokens && !any; first += LANES) {
            uint64_t words[8];
            memcpy(words, row + first, sizeof words);
            any = words[0] | words[1] | words[2] | words[3] | words[4] | words[5] | words[6] | words[7];
        }
        for (; first < tokens && !any; first++)
            any = (uint16_t)row[first];
        live[i] = any != 0;
    }
}

/* The words of a stream while they are read: near their end, from a copy with zeros after it. */
typedef struct {
    const uint16_t *end;
    int is_copy;
    uint16_t copy[2 * BLOCK * LANES];
} Source;

/* Make sure that so many groups can be read. Returns whether the stream has not run over its end. */
static int refill(Source *source, const uint16_t **at)
{
    if (source->end - *at >= BLOCK * LANES)
        return 1;
    if (source->is_copy)
        return *at <= source->end;
    if (*at > source->end)
        return 0;
    size_t left = (size_t)(source->end - *at);
    memset(source->copy, 0, sizeof source->copy);
    if (left > 0)
        memcpy(source->copy, *at, left * sizeof **at);
    *at = source->copy;
    source->end = source->copy + left;
    source->is_copy = 1;
    return 1;
}

/* Undo kvserve_encode, whatever the words hold. Returns 0, or 1 if a stream does not end as the encoder leaves it, or 2
 * if the number of escapes is wrong. words: the streams' words one after the other. slots: not for AVX-512. */
int kvserve_decode(
    int level, int64_t channels, int64_t tokens, int64_t size, const uint8_t *ids, const Table *tables,
    const uint32_t *slots, const uint16_t *words, const uint32_t *counts, const uint32_t *states,
    const uint32_t *planes, const int16_t *escapes, int64_t escape_count, int16_t *out)
{
    const Level *with = level_of(level);
    const Cut c = cut_of(tokens, size);
    const uint16_t *next = words;
    int64_t escaped = 0;
    for (int64_t batch = 0; batch < c.batches; batch++) {
        const int64_t first = c.streams * batch / c.batches;
        const int64_t stop = c.streams * (batch + 1) / c.batches;
        const int n = (int)(stop - first);
        const int is_last = stop == c.streams;
        const int64_t common = is_last ? c.short_groups : c.size;
        State lanes[MAX_STREAMS];
        Source sources[MAX_STREAMS];
        const uint16_t *at[MAX_STREAMS];
        for (int v = 0; v < n; v++) {
            at[v] = next;
            next += counts[first + v];
            sources[v].end = next;
            sources[v].is_copy = 0;
            const int64_t used = lanes_of(&c, first + v);
            for (int64_t lane = 0; lane < LANES; lane++) {
                uint32_t x = lane < used ? states[(first + v) * LANES + lane] : LOWER;
                lanes[v].hi[lane] = (uint16_t)(x >> 16);
                lanes[v].lo[lane] = (uint16_t)x;
            }
        }
        const uint32_t *p = planes;
        for (int64_t i = 0; i < channels; i++) {
            const Table *t = &tables[ids[i]];
            int16_t *const row = out + i * tokens;
            const uint32_t *const row_planes = p;
            p += c.groups * t->low_bits;
            if (t->depth == 0) {
                if (is_last)
                    decode_sole(t, row, &c, row_planes);
            } else {
                Block b = {t, slots ? slots + (size_t)ids[i] * TOTAL : NULL, lanes, c.size * LANES, c.size * t->low_bits};
                int16_t *o = row + first * b.stride;
                const uint32_t *q = row_planes + first * b.plane_stride;
                for (int64_t g = 0; g < c.size; g += BLOCK) {
                    const int64_t end = min(g + BLOCK, c.size);
                    for (int v = 0; v < n; v++)
                        if (!refill(&sources[v], &at[v]))
                            return 1;
                    if (common > g)
                        with->decode(
                            n, &b, at, q + g * t->low_bits, o + g * LANES, (int)(min(end, common) - g));
                    const int64_t rest = max(g, common);
                    if (rest < end && n > 1)
                        with->decode(
                            n - 1, &b, at, q + rest * t->low_bits, o + rest * LANES, (int)(end - rest));
                }
                if (is_last && c.part > 0) {
                    Block end = b;
                    end.states = &lanes[n - 1];
                    if (!refill(&sources[n - 1], &at[n - 1]))
                        return 1;
                    with->decode_part(
                        &end, &at[n - 1], q + (n - 1) * b.plane_stride + c.short_groups * t->low_bits,
                        o + (n - 1) * b.stride + c.short_groups * LANES, c.part);
                }
            }
            if (is_last && t->escape >= 0)
                escaped += with->restore(row, tokens, t, escapes + min(escaped, escape_count), max(escape_count - escaped, 0));
        }
        for (int v = 0; v < n; v++) {
            if (at[v] != sources[v].end)
                return 1;
            for (int lane = 0; lane < LANES; lane++)
                if (lanes[v].hi[lane] != 1 || lanes[v].lo[lane] != 0)
                    return 1;
        }
    }
    return escaped == escape_count ? 0 : 2;
}

/* The table of each channel of [channels, tokens], by the prices; from the last channel to the first, as coding goes. */
void kvserve_choose(
    int level, const int16_t *values, int64_t channels, int64_t tokens, const Prices *prices, uint8_t *ids)
{
    const Level *with = level_of(level);
    int after = 0;
    for (int64_t i = channels - 1; i >= 0; i--) {
        after = with->choose(values + i * tokens, tokens, prices, after);
        ids[i] = (uint8_t)after;
    }
}
