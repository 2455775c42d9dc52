/* Encoders and decoders that go through a matrix [channels, tokens] some channels at a time. */
#ifndef KVSERVE_CODER_H
#define KVSERVE_CODER_H

#include "rans.h"

enum { PORTABLE, AVX2, AVX512, LEVELS };
enum { CODED, BAD_STREAM, BAD_ESCAPES, NO_ROOM };

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

/* What an encoder fills: everything from its end down, because it goes through the values backwards. */
typedef struct {
    uint16_t *words;     /* for each stream `capacity`, at least 32 + the symbols that the longest one codes */
    int64_t capacity;
    uint32_t *counts;    /* for each stream its words */
    uint32_t *states;    /* for each stream 32, of which the used lanes are written */
    uint32_t *planes;
    int64_t plane_words; /* room, and then how many there are */
    int16_t *escapes;
    int64_t escaped;     /* room: all values and one channel more; and then how many there are */
} Coded;

typedef struct {
    int level;
    const Level *with;
    const Table *tables;
    const Prices *prices; /* NULL: tables are given */
    Coded *coded;
    Cut cut;
    uint32_t *planes_end;
    int16_t *escapes_end;
    int after;            /* the table of the channel after the next one, 0 for none */
    State *lanes;         /* of each stream */
    uint16_t **at;
} Encoder;

/* The words of a stream while they are read: near their end, from a copy with zeros after it. */
typedef struct {
    const uint16_t *end;
    int is_copy;
    uint16_t copy[2 * BLOCK * LANES];
} Source;

typedef struct {
    const Level *with;
    const Table *tables;
    const uint32_t *slots; /* not for AVX-512 */
    Cut cut;
    const uint32_t *planes;
    const int16_t *escapes;
    int64_t escape_count, escaped;
    State *lanes; /* of each stream */
    Source *sources;
    const uint16_t **at;
} Decoder;

Cut kvserve_cut(int64_t tokens, int64_t size);
/* The lanes of a stream that are used. */
int64_t kvserve_lanes(const Cut *, int64_t stream);

/* Returns CODED or NO_ROOM; only after CODED it may be used, and must be closed. */
int kvserve_encoder_open(
    Encoder *, int level, int64_t tokens, int64_t size, const Prices *, const Table *, Coded *);
/* Code the channels before those coded so far. Their tables are given by `ids`, or written there; then a 0 says
 * beforehand that a channel is all zero. */
void kvserve_encode_channels(Encoder *, const int16_t *values, int64_t channels, uint8_t *ids);
void kvserve_encoder_close(Encoder *);

/* words: the streams' words one after the other; states: the used lanes of each stream. As above. */
int kvserve_decoder_open(
    Decoder *, int level, int64_t tokens, int64_t size, const Table *, const uint32_t *slots, const uint16_t *words,
    const uint32_t *counts, const uint32_t *states, const uint32_t *planes, const int16_t *escapes,
    int64_t escape_count);
/* Decode the channels after those decoded so far, whatever the words hold. Returns CODED or BAD_STREAM. */
int kvserve_decode_channels(Decoder *, const uint8_t *ids, int64_t channels, int16_t *out);
/* Returns CODED if all streams ended as an encoder leaves them, and no escapes are left. */
int kvserve_decoder_close(Decoder *);

#endif
