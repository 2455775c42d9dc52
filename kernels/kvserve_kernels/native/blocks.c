/* Rows of 16-bit numbers into a paged cache, and back: one token after the other, from any token of the first block on. */
#include "transpose.h"

/* to[j * to_stride + i] = from[i * from_stride + j] */
static void turn(
    const uint16_t *from, int64_t from_stride, int64_t rows, int64_t columns, uint16_t *to, int64_t to_stride)
{
    const int64_t whole_rows = rows / TILE * TILE, whole_columns = columns / TILE * TILE;
    /* 32 rows at a time, so that whole cache lines of the result are written together */
    for (int64_t block = 0; block < whole_rows; block += 32) {
        const int64_t stop = block + 32 < whole_rows ? block + 32 : whole_rows;
        for (int64_t j = 0; j < whole_columns; j += TILE)
            for (int64_t i = block; i < stop; i += TILE)
                tile(
                    (const uint8_t *)(from + i * from_stride + j), from_stride * 2, 2,
                    (uint8_t *)(to + j * to_stride + i), to_stride * 2, 2);
    }
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; j++)
            to[j * to_stride + i] = from[i * from_stride + j];
}

/* Tokens of one head; of a cache with any strides. */
static void put(
    const uint16_t *from, int64_t row, int64_t tokens, int64_t dim, uint16_t *to, int64_t token, int64_t column)
{
    if (column == 1)
        for (int64_t t = 0; t < tokens; t++)
            memcpy(to + t * token, from + t * row, (size_t)dim * sizeof *to);
    else if (token == 1)
        turn(from, row, tokens, dim, to, column);
    else
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t d = 0; d < dim; d++)
                to[t * token + d * column] = from[t * row + d];
}

static void take(
    const uint16_t *from, int64_t token, int64_t column, int64_t tokens, int64_t dim, uint16_t *to, int64_t row)
{
    if (column == 1)
        for (int64_t t = 0; t < tokens; t++)
            memcpy(to + t * row, from + t * token, (size_t)dim * sizeof *to);
    else if (token == 1)
        turn(from, column, dim, tokens, to, row);
    else
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t d = 0; d < dim; d++)
                to[t * row + d] = from[t * token + d * column];
}

/*
 * rows: `count` tokens [heads, dim], contiguous, of the tokens `first` and following of the first of these blocks and
 * then of the next ones. shape: heads, tokens of a block, dim. strides: of a block and of each of these in the cache.
 */
void kvserve_blocks_put(
    const int64_t *blocks, int64_t first, int64_t count, const uint16_t *rows, const int64_t *shape,
    const int64_t *strides, uint16_t *cache)
{
    const int64_t heads = shape[0], size = shape[1], dim = shape[2], row = heads * dim;
    for (int64_t done = 0; done < count; first = 0, blocks++) {
        const int64_t tokens = size - first < count - done ? size - first : count - done;
        uint16_t *to = cache + *blocks * strides[0] + first * strides[2];
        for (int64_t h = 0; h < heads; h++)
            put(rows + done * row + h * dim, row, tokens, dim, to + h * strides[1], strides[2], strides[3]);
        done += tokens;
    }
}

/* The other way: what `kvserve_blocks_put` has written comes back. */
void kvserve_blocks_take(
    const int64_t *blocks, int64_t first, int64_t count, uint16_t *rows, const int64_t *shape, const int64_t *strides,
    const uint16_t *cache)
{
    const int64_t heads = shape[0], size = shape[1], dim = shape[2], row = heads * dim;
    for (int64_t done = 0; done < count; first = 0, blocks++) {
        const int64_t tokens = size - first < count - done ? size - first : count - done;
        const uint16_t *from = cache + *blocks * strides[0] + first * strides[2];
        for (int64_t h = 0; h < heads; h++)
            take(from + h * strides[1], strides[2], strides[3], tokens, dim, rows + done * row + h * dim, row);
        done += tokens;
    }
}
