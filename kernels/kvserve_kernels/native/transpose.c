/* Transposition of matrices of 8- and 16-bit integers, and histograms: what stands before and after the coder. */
#include "rans.h"
#include "transpose.h"

static inline uint16_t load_one(const uint8_t *from, int width)
{
    uint16_t value = *from;
    if (width == 2)
        memcpy(&value, from, 2);
    return value;
}

static inline __attribute__((always_inline)) void transpose_as(
    const uint8_t *in, int64_t rows, int64_t columns, const int from_width, uint8_t *out, const int to_width)
{
    const int64_t whole_rows = rows / TILE * TILE, whole_columns = columns / TILE * TILE;
    /* 32 rows at a time, so that whole cache lines of the result are written together */
    for (int64_t block = 0; block < whole_rows; block += 32) {
        const int64_t stop = block + 32 < whole_rows ? block + 32 : whole_rows;
        for (int64_t j = 0; j < whole_columns; j += TILE)
            for (int64_t i = block; i < stop; i += TILE)
                tile(
                    in + (i * columns + j) * from_width, columns * from_width, from_width,
                    out + (j * rows + i) * to_width, rows * to_width, to_width);
    }
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; j++) {
            const uint16_t value = load_one(in + (i * columns + j) * from_width, from_width);
            memcpy(out + (j * rows + i) * to_width, &value, (size_t)to_width);
        }
}

/* [batch, rows, columns] to [batch, columns, rows], widths in bytes: 1 (unsigned) or 2. */
void kvserve_transpose(
    const uint8_t *in, int64_t batch, int64_t rows, int64_t columns, int from_width, uint8_t *out, int to_width)
{
    const int64_t count = rows * columns;
    for (int64_t b = 0; b < batch; b++) {
        const uint8_t *i = in + b * count * from_width;
        uint8_t *o = out + b * count * to_width;
        if (from_width == 1 && to_width == 1)
            transpose_as(i, rows, columns, 1, o, 1);
        else if (from_width == 1)
            transpose_as(i, rows, columns, 1, o, 2);
        else if (to_width == 1)
            transpose_as(i, rows, columns, 2, o, 1);
        else
            transpose_as(i, rows, columns, 2, o, 2);
    }
}

/* counts: [tables][ways][width], ways a power of two; added up by the caller. Neighbours are often equal, and an
 * increment would wait for the one before. */
void kvserve_histograms(
    const int16_t *values, int64_t channels, int64_t tokens, const uint8_t *ids, int32_t least, int64_t ways,
    int64_t width, int64_t *counts)
{
    for (int64_t c = 0; c < channels; c++) {
        const int16_t *row = values + c * tokens;
        int64_t *own = counts + ids[c] * ways * width;
        int64_t t = 0;
        if (ways == 8)
            for (; t + 8 <= tokens; t += 8)
                for (int way = 0; way < 8; way++)
                    own[way * width + row[t + way] - least]++;
        for (; t < tokens; t++)
            own[(t & (ways - 1)) * width + row[t] - least]++;
    }
}

/* Write the sum of magnitudes of each channel; extremes[0] gets the least value of all, extremes[1] the greatest. */
void kvserve_spreads(
    const int16_t *values, int64_t channels, int64_t tokens, int64_t *sums, int16_t *extremes)
{
    int16_t least = INT16_MAX, most = INT16_MIN;
    for (int64_t c = 0; c < channels; c++) {
        const int16_t *row = values + c * tokens;
        int64_t total = 0;
        for (int64_t first = 0; first < tokens; first += 4096) {
            const int64_t stop = tokens - first < 4096 ? tokens : first + 4096;
            int32_t sum = 0;
            for (int64_t t = first; t < stop; t++) {
                const int32_t v = row[t];
                sum += v < 0 ? -v : v;
                least = row[t] < least ? row[t] : least;
                most = row[t] > most ? row[t] : most;
            }
            total += sum;
        }
        sums[c] = total;
    }
    extremes[0] = least;
    extremes[1] = most;
}
