/* Whole matrices: streams in flight, partial groups, the bounds of what may be read, escapes. */
#include <stdlib.h>

#include "coder.h"

/* Bytes of the channels that all batches of streams code in turn: they stay in the second cache. */
#define STAY_BYTES (1 << 19)

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

Cut kvserve_cut(int64_t tokens, int64_t size)
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

int64_t kvserve_lanes(const Cut *c, int64_t stream)
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

static int64_t staying(int64_t tokens)
{
    return max(1, STAY_BYTES / (tokens * (int64_t)sizeof(int16_t)));
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

int kvserve_encoder_open(
    Encoder *e, int level, int64_t tokens, int64_t size, const Prices *prices, const Table *tables, Coded *coded)
{
    e->level = level;
    e->with = level_of(level);
    e->tables = tables;
    e->prices = prices;
    e->coded = coded;
    e->cut = kvserve_cut(tokens, size);
    e->planes_end = coded->planes + coded->plane_words;
    e->escapes_end = coded->escapes + coded->escaped;
    e->after = 0;
    coded->plane_words = 0;
    coded->escaped = 0;
    e->lanes = malloc((size_t)e->cut.streams * (sizeof *e->lanes + sizeof *e->at));
    if (!e->lanes)
        return NO_ROOM;
    e->at = (uint16_t **)(e->lanes + e->cut.streams);
    for (int64_t v = 0; v < e->cut.streams; v++) {
        e->at[v] = coded->words + (v + 1) * coded->capacity;
        for (int lane = 0; lane < LANES; lane++) {
            e->lanes[v].hi[lane] = 1;
            e->lanes[v].lo[lane] = 0;
        }
    }
    return CODED;
}

void kvserve_encode_channels(Encoder *e, const int16_t *values, int64_t channels, uint8_t *ids)
{
    const Level *with = e->with;
    const Cut *const c = &e->cut;
    Coded *const coded = e->coded;
    const int64_t before = coded->plane_words;
    for (int64_t i = 0; i < channels && !e->prices; i++)
        if (e->level == AVX512 && outside_wraps(&e->tables[ids[i]]))
            with = level_of(PORTABLE);

    for (int64_t batch = 0; batch < c->batches; batch++) {
        const int64_t first = c->streams * batch / c->batches;
        const int64_t stop = c->streams * (batch + 1) / c->batches;
        const int n = (int)(stop - first);
        const int is_last = stop == c->streams;
        const int64_t common = is_last ? c->short_groups : c->size;
        State *const lanes = e->lanes + first;
        uint16_t **const at = e->at + first;
        coded->plane_words = before;
        for (int64_t i = channels - 1; i >= 0; i--) {
            const int16_t *row = values + i * c->tokens;
            if (batch == 0 && e->prices) {
                e->after = ids[i] ? with->choose(row, c->tokens, e->prices, e->after) : 0;
                ids[i] = (uint8_t)e->after;
            }
            const Table *t = &e->tables[ids[i]];
            if (batch == 0 && t->escape >= 0) {
                /* found forwards, at the start of the room, which is never that full */
                const int64_t found = with->escapes(row, c->tokens, t, coded->escapes);
                coded->escaped += found;
                memmove(e->escapes_end - coded->escaped, coded->escapes, (size_t)found * sizeof *e->escapes_end);
            }
            coded->plane_words += c->groups * t->low_bits;
            uint32_t *p = e->planes_end - coded->plane_words;
            if (t->depth == 0) {
                if (is_last)
                    encode_sole(t, row, c, p);
                continue;
            }
            Block b = {t, NULL, lanes, c->size * LANES, c->size * t->low_bits};
            row += first * b.stride;
            p += first * b.plane_stride;
            if (is_last && c->part > 0) {
                Block end = b;
                end.states = &lanes[n - 1];
                with->encode_part(
                    &end, &at[n - 1], p + (n - 1) * b.plane_stride + c->short_groups * t->low_bits,
                    row + (n - 1) * b.stride + c->short_groups * LANES, c->part);
            }
            if (common < c->size && n > 1)
                with->encode(n - 1, &b, at, p + common * t->low_bits, row + common * LANES, (int)(c->size - common));
            if (common > 0)
                with->encode(n, &b, at, p, row, (int)common);
        }
    }
}

void kvserve_encoder_close(Encoder *e)
{
    Coded *const coded = e->coded;
    for (int64_t v = 0; v < e->cut.streams; v++) {
        coded->counts[v] = (uint32_t)(coded->words + (v + 1) * coded->capacity - e->at[v]);
        for (int64_t lane = 0; lane < kvserve_lanes(&e->cut, v); lane++)
            coded->states[v * LANES + lane] = (uint32_t)e->lanes[v].hi[lane] << 16 | e->lanes[v].lo[lane];
    }
    free(e->lanes);
}

/* Code [channels, tokens] in streams of `size` groups. Returns CODED or NO_ROOM. */
int kvserve_encode(
    int level, const int16_t *values, int64_t channels, int64_t tokens, int64_t size, uint8_t *ids,
    const Prices *prices, const Table *tables, Coded *coded)
{
    Encoder e;
    if (kvserve_encoder_open(&e, level, tokens, size, prices, tables, coded) != CODED)
        return NO_ROOM;
    const int64_t step = staying(tokens);
    for (int64_t stop = channels; stop > 0; stop -= step) {
        const int64_t start = max(stop - step, 0);
        kvserve_encode_channels(&e, values + start * tokens, stop - start, ids + start);
    }
    kvserve_encoder_close(&e);
    return CODED;
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

int kvserve_decoder_open(
    Decoder *d, int level, int64_t tokens, int64_t size, const Table *tables, const uint32_t *slots,
    const uint16_t *words, const uint32_t *counts, const uint32_t *states, const uint32_t *planes,
    const int16_t *escapes, int64_t escape_count)
{
    d->with = level_of(level);
    d->tables = tables;
    d->slots = slots;
    d->cut = kvserve_cut(tokens, size);
    d->planes = planes;
    d->escapes = escapes;
    d->escape_count = escape_count;
    d->escaped = 0;
    const int64_t streams = d->cut.streams;
    d->sources = malloc((size_t)streams * (sizeof *d->sources + sizeof *d->at + sizeof *d->lanes));
    if (!d->sources)
        return NO_ROOM;
    d->at = (const uint16_t **)(d->sources + streams);
    d->lanes = (State *)(d->at + streams);
    for (int64_t v = 0; v < streams; v++) {
        d->at[v] = words;
        words += counts[v];
        d->sources[v].end = words;
        d->sources[v].is_copy = 0;
        const int64_t used = kvserve_lanes(&d->cut, v);
        for (int64_t lane = 0; lane < LANES; lane++) {
            uint32_t x = lane < used ? *states++ : LOWER;
            d->lanes[v].hi[lane] = (uint16_t)(x >> 16);
            d->lanes[v].lo[lane] = (uint16_t)x;
        }
    }
    return CODED;
}

int kvserve_decode_channels(Decoder *d, const uint8_t *ids, int64_t channels, int16_t *out)
{
    const Level *const with = d->with;
    const Cut *const c = &d->cut;
    const uint32_t *p = d->planes;
    for (int64_t batch = 0; batch < c->batches; batch++) {
        const int64_t first = c->streams * batch / c->batches;
        const int64_t stop = c->streams * (batch + 1) / c->batches;
        const int n = (int)(stop - first);
        const int is_last = stop == c->streams;
        const int64_t common = is_last ? c->short_groups : c->size;
        State *const lanes = d->lanes + first;
        Source *const sources = d->sources + first;
        const uint16_t **const at = d->at + first;
        p = d->planes;
        for (int64_t i = 0; i < channels; i++) {
            const Table *t = &d->tables[ids[i]];
            int16_t *const row = out + i * c->tokens;
            const uint32_t *const row_planes = p;
            p += c->groups * t->low_bits;
            if (t->depth == 0) {
                if (is_last)
                    decode_sole(t, row, c, row_planes);
            } else {
                Block b = {
                    t, d->slots ? d->slots + (size_t)ids[i] * TOTAL : NULL, lanes, c->size * LANES,
                    c->size * t->low_bits};
                int16_t *o = row + first * b.stride;
                const uint32_t *q = row_planes + first * b.plane_stride;
                for (int64_t g = 0; g < c->size; g += BLOCK) {
                    const int64_t end = min(g + BLOCK, c->size);
                    for (int v = 0; v < n; v++)
                        if (!refill(&sources[v], &at[v]))
                            return BAD_STREAM;
                    if (common > g)
                        with->decode(
                            n, &b, at, q + g * t->low_bits, o + g * LANES, (int)(min(end, common) - g));
                    const int64_t rest = max(g, common);
                    if (rest < end && n > 1)
                        with->decode(
                            n - 1, &b, at, q + rest * t->low_bits, o + rest * LANES, (int)(end - rest));
                }
                if (is_last && c->part > 0) {
                    Block end = b;
                    end.states = &lanes[n - 1];
                    if (!refill(&sources[n - 1], &at[n - 1]))
                        return BAD_STREAM;
                    with->decode_part(
                        &end, &at[n - 1], q + (n - 1) * b.plane_stride + c->short_groups * t->low_bits,
                        o + (n - 1) * b.stride + c->short_groups * LANES, c->part);
                }
            }
            if (is_last && t->escape >= 0)
                d->escaped += with->restore(
                    row, c->tokens, t, d->escapes + min(d->escaped, d->escape_count),
                    max(d->escape_count - d->escaped, 0));
        }
    }
    d->planes = p;
    return CODED;
}

int kvserve_decoder_close(Decoder *d)
{
    int status = d->escaped == d->escape_count ? CODED : BAD_ESCAPES;
    for (int64_t v = 0; v < d->cut.streams; v++) {
        if (d->at[v] != d->sources[v].end)
            status = BAD_STREAM;
        for (int lane = 0; lane < LANES; lane++)
            if (d->lanes[v].hi[lane] != 1 || d->lanes[v].lo[lane] != 0)
                status = BAD_STREAM;
    }
    free(d->sources);
    return status;
}

/* Undo kvserve_encode, whatever the words hold. Returns CODED, BAD_STREAM, BAD_ESCAPES or NO_ROOM. */
int kvserve_decode(
    int level, int64_t channels, int64_t tokens, int64_t size, const uint8_t *ids, const Table *tables,
    const uint32_t *slots, const uint16_t *words, const uint32_t *counts, const uint32_t *states,
    const uint32_t *planes, const int16_t *escapes, int64_t escape_count, int16_t *out)
{
    Decoder d;
    int status = kvserve_decoder_open(
        &d, level, tokens, size, tables, slots, words, counts, states, planes, escapes, escape_count);
    if (status != CODED)
        return status;
    const int64_t step = staying(tokens);
    for (int64_t start = 0; start < channels && status == CODED; start += step)
        status = kvserve_decode_channels(&d, ids + start, min(step, channels - start), out + start * tokens);
    const int end = kvserve_decoder_close(&d);
    return status == CODED ? end : status;
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
