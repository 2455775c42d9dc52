/* Work on one channel's values in plain C, compiled for each instruction set: all integers, so all give the same. */
#ifndef KVSERVE_ROWS_H
#define KVSERVE_ROWS_H

#include "rans.h"

#define STRETCH 256

static inline int64_t row_escapes(const int16_t *row, int64_t tokens, const Table *t, int16_t *out)
{
    const int16_t base = (int16_t)t->base;
    const uint16_t span = (uint16_t)t->span;
    int64_t count = 0;
    for (int64_t first = 0; first < tokens; first += STRETCH) {
        const int64_t stop = first + STRETCH < tokens ? first + STRETCH : tokens;
        uint16_t any = 0;
        for (int64_t i = first; i < stop; i++) {
            any |= (uint16_t)((uint16_t)(row[i] - base) >= span);
            /* the distance wraps, which can make it look small */
            any |= (uint16_t)(row[i] < base);
        }
        if (!any)
            continue;
        for (int64_t i = first; i < stop; i++)
            if (is_outside(t, row[i]))
                out[count++] = row[i];
    }
    return count;
}

/* A decoded escape symbol stands as a value beyond the span, where no other symbol can be. */
static inline int64_t row_restore(int16_t *row, int64_t tokens, const Table *t, const int16_t *escapes, int64_t left)
{
    const int16_t base = (int16_t)t->base;
    const uint16_t span = (uint16_t)t->span;
    int64_t count = 0;
    for (int64_t first = 0; first < tokens; first += STRETCH) {
        const int64_t stop = first + STRETCH < tokens ? first + STRETCH : tokens;
        uint16_t any = 0;
        for (int64_t i = first; i < stop; i++)
            any |= (uint16_t)((uint16_t)(row[i] - base) >= span);
        if (!any)
            continue;
        for (int64_t i = first; i < stop; i++)
            if ((uint16_t)(row[i] - base) >= span) {
                if (count < left)
                    row[i] = escapes[count];
                count++;
            }
    }
    return count;
}

/* at_least: how many values have at least the magnitude of each bin. Returns the number of bins that have any. */
static inline int row_bins(const int16_t *row, int64_t tokens, int64_t at_least[2 * BIN_PAIRS + 1])
{
    int bins = 1;
    memset(at_least, 0, (2 * BIN_PAIRS + 1) * sizeof *at_least);
    at_least[0] = tokens;
    for (; bins < BINS; bins++) {
        const int16_t bound = (int16_t)least_magnitudes[bins];
        int64_t count = 0;
        for (int64_t first = 0; first < tokens; first += STRETCH) {
            const int64_t stop = first + STRETCH < tokens ? first + STRETCH : tokens;
            uint16_t part = 0;
            for (int64_t i = first; i < stop; i++)
                part = (uint16_t)(part + (uint16_t)((row[i] >= bound) | (row[i] <= (int16_t)-bound)));
            count += part;
        }
        if (count == 0)
            break;
        at_least[bins] = count;
    }
    return bins;
}

/* The counts within each bin, in at most 15 bits so that sums of costs fit 32. Returns by how much costs are shifted. */
static inline int bin_counts(
    int64_t tokens, const int64_t at_least[2 * BIN_PAIRS + 1], int16_t counts[2 * BIN_PAIRS])
{
    int shift = 0;
    while ((tokens + ((int64_t)1 << shift) - 1) >> shift > INT16_MAX)
        shift++;
    /* rounded up: what occurs at all must count */
    const int64_t up = ((int64_t)1 << shift) - 1;
    for (int bin = 0; bin < 2 * BIN_PAIRS; bin++)
        counts[bin] = (int16_t)((at_least[bin] - at_least[bin + 1] + up) >> shift);
    return shift;
}

/* The table that codes a channel in fewest bits, as far as magnitudes say. */
static inline int row_choose(const int16_t *row, int64_t tokens, const Prices *prices, int after)
{
    int64_t at_least[2 * BIN_PAIRS + 1];
    int16_t counts[2 * BIN_PAIRS];
    int32_t cost[TABLES];
    const int bins = row_bins(row, tokens, at_least);
    if (bins == 1)
        return 0;
    const int shift = bin_counts(tokens, at_least, counts);
    memset(cost, 0, sizeof cost);
    for (int pair = 0; 2 * pair < bins; pair++) {
        const int32_t a = counts[2 * pair], b = counts[2 * pair + 1];
        for (int i = 0; i < prices->count; i++)
            cost[i] += a * prices->lengths[pair][i][0] + b * prices->lengths[pair][i][1];
    }
    int32_t least = cost[1];
    for (int i = 2; i < prices->count; i++)
        least = cost[i] < least ? cost[i] : least;
    if (after > 0 && cost[after] <= least + (prices->keep >> shift))
        return after;
    int best = 1;
    while (cost[best] != least)
        best++;
    return best;
}

#endif
