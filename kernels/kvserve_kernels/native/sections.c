/* Sections of code.ladder.v1. Streams are decoded by AVX-512 only: what calls this has looked. */
#include <stdlib.h>

#include "sections.h"

enum { PLAIN, RANS };
#define HEAD_BYTES 12
#define PLAIN_NUMBERS 255
#define MOST_GROUPS 65535
#define LEAST_GROUPS 4
#define SYMBOLS_PER_STREAM 131072

typedef struct {
    uint8_t mode, table;
    uint16_t groups;
    uint32_t escapes, number_escapes;
} Head;

static int64_t min(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t max(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

int64_t kvserve_section_groups(int64_t coded, int64_t tokens)
{
    if (coded == 0)
        return 0;
    const int64_t groups = (tokens + LANES - 1) / LANES;
    const int64_t streams = max(1, coded * tokens / SYMBOLS_PER_STREAM);
    return min(min(max((groups + streams - 1) / streams, LEAST_GROUPS), groups), MOST_GROUPS);
}

int64_t kvserve_section_bytes(int64_t channels, int64_t tokens)
{
    return HEAD_BYTES + 2 * channels * tokens;
}

/* Memory for what an encoder of a matrix fills; NULL if there is none. */
static char *room_of(Coded *coded, int64_t channels, int64_t tokens, int64_t size, int64_t most_low_bits)
{
    const Cut c = kvserve_cut(tokens, size);
    coded->capacity = channels * min(c.size * LANES, tokens) + LANES;
    coded->plane_words = channels * most_low_bits * c.groups;
    coded->escaped = channels * tokens + tokens;
    const int64_t words = c.streams * coded->capacity;
    char *memory = malloc(
        (size_t)(c.streams * (1 + LANES) + coded->plane_words) * sizeof(uint32_t) +
        (size_t)(words + coded->escaped) * sizeof(uint16_t));
    if (memory) {
        coded->counts = (uint32_t *)memory;
        coded->states = coded->counts + c.streams;
        coded->planes = coded->states + c.streams * LANES;
        coded->words = (uint16_t *)(coded->planes + coded->plane_words);
        coded->escapes = (int16_t *)(coded->words + words);
    }
    return memory;
}

static int64_t body_bytes(const Encoder *e)
{
    const Coded *coded = e->coded;
    const Cut *c = &e->cut;
    int64_t bytes = 4 * c->streams + 4 * coded->plane_words + 2 * coded->escaped;
    for (int64_t v = 0; v < c->streams; v++)
        bytes += 4 * kvserve_lanes(c, v) + 2 * (int64_t)coded->counts[v];
    return bytes;
}

static uint8_t *put(uint8_t *out, const void *from, int64_t bytes)
{
    memcpy(out, from, (size_t)bytes);
    return out + bytes;
}

static uint8_t *put_body(uint8_t *out, const Encoder *e)
{
    const Coded *coded = e->coded;
    const Cut *c = &e->cut;
    out = put(out, coded->counts, 4 * c->streams);
    for (int64_t v = 0; v < c->streams; v++)
        out = put(out, coded->states + v * LANES, 4 * kvserve_lanes(c, v));
    out = put(out, e->planes_end - coded->plane_words, 4 * coded->plane_words);
    for (int64_t v = 0; v < c->streams; v++)
        out = put(out, coded->words + (v + 1) * coded->capacity - coded->counts[v], 2 * (int64_t)coded->counts[v]);
    return put(out, e->escapes_end - coded->escaped, 2 * coded->escaped);
}

int kvserve_writer_open(Writer *w, int level, int64_t channels, int64_t tokens, int64_t size, const Ladder *ladder)
{
    w->ladder = ladder;
    w->channels = w->left = channels;
    w->tokens = tokens;
    w->size = size;
    w->memory = room_of(&w->coded, channels, tokens, size, ladder->most_low_bits);
    w->ids = malloc((size_t)channels);
    if (w->memory && w->ids &&
        kvserve_encoder_open(&w->encoder, level, tokens, size, ladder->prices, ladder->tables, &w->coded) == CODED) {
        /* which channels are all zero shows when their tables are chosen */
        memset(w->ids, 1, (size_t)channels);
        return CODED;
    }
    free(w->memory);
    free(w->ids);
    return NO_ROOM;
}

void kvserve_writer_add(Writer *w, const int16_t *levels, int64_t channels)
{
    w->left -= channels;
    kvserve_encode_channels(&w->encoder, levels, channels, w->ids + w->left);
}

/* The whole section, if it is smaller than plain levels. */
static int64_t put_section(const Writer *w, const int16_t *differences, uint8_t *out)
{
    Head head = {.mode = RANS, .groups = (uint16_t)w->size, .escapes = (uint32_t)w->coded.escaped};
    Coded numbers;
    Encoder e;
    uint8_t table = 1;
    char *memory = room_of(&numbers, 1, w->channels, MOST_GROUPS, w->ladder->most_low_bits);
    if (!memory)
        return -1;
    if (kvserve_encoder_open(
            &e, w->encoder.level, w->channels, MOST_GROUPS, w->ladder->prices, w->ladder->tables, &numbers) != CODED) {
        free(memory);
        return -1;
    }
    kvserve_encode_channels(&e, differences, 1, &table);
    kvserve_encoder_close(&e);
    int64_t bytes = body_bytes(&e);
    head.table = table;
    head.number_escapes = (uint32_t)numbers.escaped;
    if (bytes >= w->channels) {
        bytes = w->channels;
        head.table = PLAIN_NUMBERS;
        head.number_escapes = 0;
    }
    const int64_t gap = -bytes & 3;
    int64_t total = HEAD_BYTES + bytes + gap + body_bytes(&w->encoder);
    if (total < kvserve_section_bytes(w->channels, w->tokens)) {
        out = put(out, &head, HEAD_BYTES);
        out = head.table == PLAIN_NUMBERS ? put(out, w->ids, bytes) : put_body(out, &e);
        memset(out, 0, (size_t)gap);
        put_body(out + gap, &w->encoder);
    } else {
        total = 0;
    }
    free(memory);
    return total;
}

int64_t kvserve_writer_close(Writer *w, uint8_t *out)
{
    int64_t live = 0, bytes = 0;
    kvserve_encoder_close(&w->encoder);
    for (int64_t i = 0; i < w->channels; i++)
        live += w->ids[i] > 0;
    if (live > 0 && kvserve_section_groups(live, w->tokens) == w->size) {
        int16_t *differences = malloc((size_t)w->channels * sizeof *differences);
        if (differences) {
            for (int64_t i = 0; i < w->channels; i++)
                differences[i] = (int16_t)(w->ids[i] - (i ? w->ids[i - 1] : 0));
            bytes = put_section(w, differences, out);
            free(differences);
        } else {
            bytes = -1;
        }
    }
    free(w->memory);
    free(w->ids);
    return bytes;
}

void kvserve_live(const int16_t *values, int64_t channels, int64_t tokens, uint8_t *live);

int64_t kvserve_section_write(
    int level, const int16_t *levels, int64_t channels, int64_t tokens, const Ladder *ladder, uint8_t *out)
{
    const int64_t all = channels * tokens;
    int64_t coded = 0, bytes = 0;
    for (int64_t i = 0; i < channels; i++) {
        uint8_t live;
        kvserve_live(levels + i * tokens, 1, tokens, &live);
        coded += live;
    }
    const int64_t size = kvserve_section_groups(coded, tokens);
    Head head = {.mode = RANS};
    if (size == 0) {
        put(out, &head, HEAD_BYTES);
        return HEAD_BYTES;
    }
    Writer w;
    if (kvserve_writer_open(&w, level, channels, tokens, size, ladder) != CODED)
        return -1;
    kvserve_writer_add(&w, levels, channels);
    bytes = kvserve_writer_close(&w, out);
    if (bytes != 0)
        return bytes;
    head.mode = PLAIN;
    put(put(out, &head, HEAD_BYTES), levels, 2 * all);
    return HEAD_BYTES + 2 * all;
}

typedef struct {
    const uint8_t *at, *end;
} Bytes;

/* The next bytes, or NULL if there are not so many. */
static const void *take(Bytes *b, int64_t bytes)
{
    if (bytes > b->end - b->at)
        return NULL;
    b->at += bytes;
    return b->at - bytes;
}

static int open_body(
    Decoder *d, int level, Bytes *b, const uint8_t *ids, int64_t channels, int64_t tokens, int64_t size,
    int64_t escapes, const Ladder *ladder)
{
    const Cut c = kvserve_cut(tokens, size);
    int64_t lanes = 0, planes = 0, words = 0;
    for (int64_t v = 0; v < c.streams; v++)
        lanes += kvserve_lanes(&c, v);
    for (int64_t i = 0; i < channels; i++)
        planes += ladder->tables[ids[i]].low_bits * c.groups;
    const uint32_t *counts = take(b, 4 * c.streams);
    const uint32_t *states = take(b, 4 * lanes);
    const uint32_t *plane_words = take(b, 4 * planes);
    if (!counts || !states || !plane_words)
        return BAD_STREAM;
    for (int64_t v = 0; v < c.streams; v++)
        words += counts[v];
    const uint16_t *stream = take(b, 2 * words);
    const int16_t *escaped = take(b, 2 * escapes);
    if (!stream || !escaped)
        return BAD_STREAM;
    return kvserve_decoder_open(
        d, level, tokens, size, ladder->tables, NULL, stream, counts, states, plane_words, escaped, escapes);
}

/* Read the table of each channel. */
static int read_numbers(
    Bytes *b, int level, const Head *head, int64_t channels, const Ladder *ladder, uint8_t *ids)
{
    if (head->table == PLAIN_NUMBERS && head->number_escapes == 0) {
        const uint8_t *plain = take(b, channels);
        for (int64_t i = 0; plain && i < channels; i++) {
            if (plain[i] >= ladder->count)
                return BAD_STREAM;
            ids[i] = plain[i];
        }
        return plain ? CODED : BAD_STREAM;
    }
    if (head->table >= ladder->count || (head->table == 0 && head->number_escapes > 0))
        return BAD_STREAM;
    memset(ids, 0, (size_t)channels);
    if (head->table == 0)
        return CODED;
    Decoder d;
    int status =
        open_body(&d, level, b, &head->table, 1, channels, MOST_GROUPS, head->number_escapes, ladder);
    if (status != CODED)
        return status;
    int16_t *differences = malloc((size_t)channels * sizeof *differences);
    status = differences ? kvserve_decode_channels(&d, &head->table, 1, differences) : NO_ROOM;
    const int end = kvserve_decoder_close(&d);
    status = status == CODED ? end : status;
    int64_t number = 0;
    for (int64_t i = 0; i < channels && status == CODED; i++) {
        number += differences[i];
        if (number < 0 || number >= ladder->count)
            status = BAD_STREAM;
        else
            ids[i] = (uint8_t)number;
    }
    free(differences);
    return status;
}

static int read_head(
    Reader *r, int level, const uint8_t *section, int64_t bytes, int64_t channels, int64_t tokens,
    const Ladder *ladder)
{
    Bytes b = {section, section + bytes};
    Head head;
    const void *start = take(&b, HEAD_BYTES);
    if (!start)
        return BAD_STREAM;
    memcpy(&head, start, HEAD_BYTES);
    if (head.mode == PLAIN && !head.table && !head.groups && !head.escapes && !head.number_escapes) {
        r->plain = take(&b, 2 * channels * tokens);
        return r->plain && b.at == b.end ? CODED : BAD_STREAM;
    }
    if (head.mode != RANS)
        return BAD_STREAM;
    int status = read_numbers(&b, level, &head, channels, ladder, r->ids);
    if (status != CODED)
        return status;
    const uint8_t *gap = take(&b, -(b.at - section) & 3);
    for (; gap && gap < b.at; gap++)
        if (*gap)
            return BAD_STREAM;
    int64_t coded = 0;
    for (int64_t i = 0; i < channels; i++)
        coded += ladder->tables[r->ids[i]].depth > 0;
    if (!gap || (coded > 0) != (head.groups > 0) || (coded == 0 && head.escapes > 0))
        return BAD_STREAM;
    if (coded == 0)
        return b.at == b.end ? CODED : BAD_STREAM;
    status = open_body(&r->decoder, level, &b, r->ids, channels, tokens, head.groups, head.escapes, ladder);
    if (status != CODED)
        return status;
    r->is_coded = 1;
    return b.at == b.end ? CODED : BAD_STREAM;
}

int kvserve_reader_open(
    Reader *r, int level, const uint8_t *section, int64_t bytes, int64_t channels, int64_t tokens,
    const Ladder *ladder)
{
    r->plain = NULL;
    r->is_coded = 0;
    r->tokens = tokens;
    r->done = 0;
    r->ids = malloc((size_t)channels);
    if (!r->ids)
        return NO_ROOM;
    const int status = read_head(r, level, section, bytes, channels, tokens, ladder);
    if (status != CODED)
        kvserve_reader_close(r);
    return status;
}

const int16_t *kvserve_reader_next(Reader *r, int64_t channels, int16_t *room)
{
    const int64_t at = r->done;
    r->done += channels;
    if (r->plain)
        return r->plain + at * r->tokens;
    if (!r->is_coded)
        return memset(room, 0, (size_t)(channels * r->tokens) * sizeof *room);
    return kvserve_decode_channels(&r->decoder, r->ids + at, channels, room) == CODED ? room : NULL;
}

int kvserve_reader_close(Reader *r)
{
    const int status = r->is_coded ? kvserve_decoder_close(&r->decoder) : CODED;
    free(r->ids);
    return status;
}
