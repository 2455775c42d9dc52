/* Cache values to sections of levels and back, one group of channels at a time: its levels stay in the second cache. */
#include "linear.h"
#include "sections.h"

/* What the functions here return: DONE, REFUSED, NO_MEMORY, or these. */
enum { OTHERWISE = 3, MALFORMED };

static int64_t most_components(const Group *groups, int64_t count)
{
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++)
        most = groups[i].components > most ? groups[i].components : most;
    return most;
}

/* Write all groups as one section, of streams of `size` groups of 32 tokens. `bytes` gets its length. Returns OTHERWISE
 * if that is not how it must be written. */
int kvserve_fused_encode(
    int linear, int level, const Piece *p, const Group *groups, int64_t count, int64_t size, const Ladder *ladder,
    uint8_t *out, int64_t *bytes)
{
    int64_t channels = 0;
    for (int64_t i = 0; i < count; i++)
        channels += groups[i].components;
    int16_t *levels = malloc((size_t)(most_components(groups, count) * p->tokens + 1) * sizeof *levels);
    Bench bench;
    Writer w;
    int status = levels ? kvserve_bench_open(&bench, p, groups, count, p->tokens, linear, 0) : NO_MEMORY;
    if (status != DONE) {
        free(levels);
        return status;
    }
    if (kvserve_writer_open(&w, level, channels, p->tokens, size, ladder) != CODED) {
        status = NO_MEMORY;
    } else {
        for (int64_t i = count - 1; i >= 0 && status == DONE; i--) {
            const Run all = {groups + i, 0, p->tokens, levels};
            status = kvserve_linear_runs(p, &all, 1, &bench);
            if (status == DONE)
                kvserve_writer_add(&w, levels, groups[i].components);
        }
        *bytes = kvserve_writer_close(&w, out);
        if (status == DONE)
            status = *bytes > 0 ? DONE : *bytes < 0 ? NO_MEMORY : OTHERWISE;
    }
    kvserve_bench_close(&bench);
    free(levels);
    return status;
}

/* Undo kvserve_fused_encode, whatever the section holds. */
int kvserve_fused_decode(
    int linear, int level, const Piece *p, const Group *groups, int64_t count, const Ladder *ladder,
    const uint8_t *section, int64_t bytes)
{
    int64_t channels = 0;
    for (int64_t i = 0; i < count; i++)
        channels += groups[i].components;
    Reader r;
    int status = kvserve_reader_open(&r, level, section, bytes, channels, p->tokens, ladder);
    if (status != CODED)
        return status == NO_ROOM ? NO_MEMORY : MALFORMED;
    int16_t *room = malloc((size_t)(most_components(groups, count) * p->tokens + 1) * sizeof *room);
    Bench bench;
    status = room ? kvserve_bench_open(&bench, p, groups, count, p->tokens, linear, 1) : NO_MEMORY;
    if (status == DONE) {
        for (int64_t i = 0; i < count && status == DONE; i++) {
            const int16_t *levels = kvserve_reader_next(&r, groups[i].components, room);
            const Run all = {groups + i, 0, p->tokens, (int16_t *)levels};
            status = levels ? kvserve_linear_runs(p, &all, 1, &bench) : MALFORMED;
        }
        kvserve_bench_close(&bench);
    }
    free(room);
    const int end = kvserve_reader_close(&r);
    return status == DONE && end != CODED ? MALFORMED : status;
}

/* The runs of a block: tokens by their group, groups of the same matrices. Returns their levels' memory, or NULL. */
static int16_t *runs_of(Run *runs, const Group *groups, const int64_t *starts, int64_t count)
{
    int64_t all = 0;
    for (int64_t i = 0; i < count; i++)
        all += groups[i].components * (starts[i + 1] - starts[i]);
    int16_t *const memory = malloc((size_t)(all + 1) * sizeof *memory);
    int16_t *levels = memory;
    for (int64_t i = 0; i < count && memory; i++) {
        runs[i] = (Run){groups + i, starts[i], starts[i + 1] - starts[i], levels};
        levels += groups[i].components * runs[i].tokens;
    }
    return memory;
}

#define MOST_RUNS 64

/* Write one section for each of at most 64 groups, which share their matrices, for tokens starts[i] to starts[i + 1] of
 * the order; each followed by zeros to a multiple of 8. */
int kvserve_fused_encode_runs(
    int linear, int level, const Piece *p, const Group *groups, const int64_t *starts, int64_t count,
    const Ladder *ladder, uint8_t *out, int64_t *bytes)
{
    Run runs[MOST_RUNS];
    Bench bench;
    int16_t *memory = runs_of(runs, groups, starts, count);
    int status =
        memory ? kvserve_bench_open(&bench, p, groups, count, starts[count] - starts[0], linear, 0) : NO_MEMORY;
    if (status == DONE) {
        status = kvserve_linear_runs(p, runs, count, &bench);
        kvserve_bench_close(&bench);
    }
    for (int64_t i = 0; i < count && status == DONE; i++) {
        bytes[i] = kvserve_section_write(level, runs[i].levels, groups[i].components, runs[i].tokens, ladder, out);
        if (bytes[i] < 0) {
            status = NO_MEMORY;
            break;
        }
        out += bytes[i];
        for (; (uintptr_t)out & 7; out++)
            *out = 0;
    }
    free(memory);
    return status;
}

/* Undo kvserve_fused_encode_runs, whatever the sections hold, which lie at a multiple of 8. */
int kvserve_fused_decode_runs(
    int linear, int level, const Piece *p, const Group *groups, const int64_t *starts, int64_t count,
    const Ladder *ladder, const uint8_t *sections, const int64_t *bytes)
{
    Run runs[MOST_RUNS];
    Bench bench;
    int16_t *memory = runs_of(runs, groups, starts, count);
    int status = memory ? DONE : NO_MEMORY;
    for (int64_t i = 0; i < count && status == DONE; i++) {
        Reader r;
        status = kvserve_reader_open(&r, level, sections, bytes[i], groups[i].components, runs[i].tokens, ladder);
        if (status == CODED) {
            const int16_t *levels = kvserve_reader_next(&r, groups[i].components, runs[i].levels);
            if (levels && levels != runs[i].levels)
                runs[i].levels = (int16_t *)levels;
            status = kvserve_reader_close(&r) == CODED && levels ? DONE : MALFORMED;
        } else {
            status = status == NO_ROOM ? NO_MEMORY : MALFORMED;
        }
        sections += (bytes[i] + 7) / 8 * 8;
    }
    if (status == DONE) {
        status = kvserve_bench_open(&bench, p, groups, count, starts[count] - starts[0], linear, 1);
        if (status == DONE) {
            status = kvserve_linear_runs(p, runs, count, &bench);
            kvserve_bench_close(&bench);
        }
    }
    free(memory);
    return status;
}
