/* Sections of code.ladder.v1: the bytes are those of kvserve_strategies/ladder.py, which defines them. */
#ifndef KVSERVE_SECTIONS_H
#define KVSERVE_SECTIONS_H

#include "coder.h"

/* The built-in tables, by whose numbers channels name theirs. */
typedef struct {
    const Table *tables;
    const Prices *prices;
    int64_t count;
    int64_t most_low_bits;
} Ladder;

/* A section while it is made, from the last channel to the first. */
typedef struct {
    Encoder encoder;
    Coded coded;
    const Ladder *ladder;
    int64_t channels, tokens, size, left; /* channels that are not coded yet */
    uint8_t *ids;
    char *memory;
} Writer;

/* A section while it is read. Its levels are all there, all zero, or to be decoded. */
typedef struct {
    Decoder decoder;
    const int16_t *plain;
    int is_coded;
    int64_t tokens, done; /* channels that are read */
    uint8_t *ids;
} Reader;

/* Groups of 32 tokens of a stream, 0 if no channel is coded. */
int64_t kvserve_section_groups(int64_t coded, int64_t tokens);
/* The most bytes of a section. */
int64_t kvserve_section_bytes(int64_t channels, int64_t tokens);

/* Returns CODED or NO_ROOM; only after CODED it must be closed. */
int kvserve_writer_open(Writer *, int level, int64_t channels, int64_t tokens, int64_t size, const Ladder *);
/* Code the channels before those coded so far. */
void kvserve_writer_add(Writer *, const int16_t *levels, int64_t channels);
/* Returns the bytes written; 0 if streams should have been cut in another way or plain levels are smaller; -1 without
 * memory. */
int64_t kvserve_writer_close(Writer *, uint8_t *out);
/* Write levels as a section of kvserve_section_bytes at most. Returns its bytes, or -1 without memory. */
int64_t kvserve_section_write(
    int level, const int16_t *levels, int64_t channels, int64_t tokens, const Ladder *, uint8_t *out);

/* Returns CODED, BAD_STREAM for what no encoder writes, or NO_ROOM; only after CODED it must be closed. */
int kvserve_reader_open(
    Reader *, int level, const uint8_t *section, int64_t bytes, int64_t channels, int64_t tokens, const Ladder *);
/* Get the levels of the next channels: where they are, or in the room for them. NULL for what no encoder writes. */
const int16_t *kvserve_reader_next(Reader *, int64_t channels, int16_t *room);
/* Returns CODED if nothing is left over. */
int kvserve_reader_close(Reader *);

#endif
