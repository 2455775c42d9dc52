/* Rows of 16-bit numbers into tiles with pairs side by side, as matrix units like them, and back. */
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && !defined(KVSERVE_PORTABLE_ONLY)
#include <emmintrin.h>
#define SQUARE 4

/* 4 rows of 4 pairs become 4 columns, or 4 columns 4 rows; steps from one to the next are in bytes. */
static inline void turn(const void *from, int64_t from_step, void *to, int64_t to_step)
{
    __m128i a[SQUARE];
    for (int i = 0; i < SQUARE; i++)
        a[i] = _mm_loadu_si128((const void *)((const char *)from + i * from_step));
    const __m128i low = _mm_unpacklo_epi32(a[0], a[1]), high = _mm_unpackhi_epi32(a[0], a[1]);
    const __m128i low2 = _mm_unpacklo_epi32(a[2], a[3]), high2 = _mm_unpackhi_epi32(a[2], a[3]);
    char *out = to;
    _mm_storeu_si128((void *)out, _mm_unpacklo_epi64(low, low2));
    _mm_storeu_si128((void *)(out + to_step), _mm_unpackhi_epi64(low, low2));
    _mm_storeu_si128((void *)(out + 2 * to_step), _mm_unpacklo_epi64(high, high2));
    _mm_storeu_si128((void *)(out + 3 * to_step), _mm_unpackhi_epi64(high, high2));
}
#else
#define SQUARE (1 << 30)
static inline void turn(const void *from, int64_t from_step, void *to, int64_t to_step)
{
    (void)from, (void)from_step, (void)to, (void)to_step;
}
#endif

/* Two dimensions make a pair: [inner] tokens by [pairs] of one head. */
static void dimensions(
    const uint16_t *from, int64_t row, uint32_t *to, int64_t inner, int64_t inner_stride, int64_t pairs,
    int64_t columns, int64_t group_stride, int64_t column_stride)
{
    /* a square has to lie in one run of pairs at an even distance, and of tokens side by side */
    const int64_t even = columns == 1 ? group_stride : column_stride;
    const int squares = inner_stride == 1 && (columns == 1 || columns == pairs);
    const int64_t whole_inner = squares ? inner / SQUARE * SQUARE : 0;
    const int64_t whole_pairs = squares ? pairs / SQUARE * SQUARE : 0;
    for (int64_t p = 0; p < whole_pairs; p += SQUARE)
        for (int64_t i = 0; i < whole_inner; i += SQUARE)
            turn(from + i * row + 2 * p, row * sizeof *from, to + p * even + i, even * sizeof *to);
    for (int64_t i = 0; i < inner; i++)
        for (int64_t p = i < whole_inner ? whole_pairs : 0; p < pairs; p++)
            memcpy(
                to + i * inner_stride + p / columns * group_stride + p % columns * column_stride,
                from + i * row + 2 * p, sizeof *to);
}

/* Two tokens make a pair: one row of pairs of one head. */
static void tokens(
    const uint16_t *restrict from, int64_t row, uint32_t *restrict to, int64_t groups, int64_t columns,
    int64_t group_stride, int64_t column_stride)
{
    for (int64_t g = 0; g < groups; g++) {
        const uint16_t *even = from + g * columns, *odd = even + row;
        uint32_t *out = to + g * group_stride;
        if (column_stride == 1)
            for (int64_t c = 0; c < columns; c++)
                out[c] = even[c] | (uint32_t)odd[c] << 16;
        else
            for (int64_t c = 0; c < columns; c++)
                out[c * column_stride] = even[c] | (uint32_t)odd[c] << 16;
    }
}

static void dimensions_back(
    const uint32_t *from, uint16_t *to, int64_t row, int64_t inner, int64_t inner_stride, int64_t pairs,
    int64_t columns, int64_t group_stride, int64_t column_stride)
{
    const int64_t even = columns == 1 ? group_stride : column_stride;
    const int squares = inner_stride == 1 && (columns == 1 || columns == pairs);
    const int64_t whole_inner = squares ? inner / SQUARE * SQUARE : 0;
    const int64_t whole_pairs = squares ? pairs / SQUARE * SQUARE : 0;
    for (int64_t i = 0; i < whole_inner; i += SQUARE)
        for (int64_t p = 0; p < whole_pairs; p += SQUARE)
            turn(from + p * even + i, even * sizeof *from, to + i * row + 2 * p, row * sizeof *to);
    for (int64_t i = 0; i < inner; i++)
        for (int64_t p = i < whole_inner ? whole_pairs : 0; p < pairs; p++)
            memcpy(
                to + i * row + 2 * p,
                from + i * inner_stride + p / columns * group_stride + p % columns * column_stride, sizeof *from);
}

static void tokens_back(
    const uint32_t *restrict from, uint16_t *restrict to, int64_t row, int64_t groups, int64_t columns,
    int64_t group_stride, int64_t column_stride)
{
    for (int64_t g = 0; g < groups; g++) {
        uint16_t *even = to + g * columns, *odd = even + row;
        const uint32_t *in = from + g * group_stride;
        if (column_stride == 1)
            for (int64_t c = 0; c < columns; c++) {
                even[c] = (uint16_t)in[c];
                odd[c] = (uint16_t)(in[c] >> 16);
            }
        else
            for (int64_t c = 0; c < columns; c++) {
                even[c] = (uint16_t)in[c * column_stride];
                odd[c] = (uint16_t)(in[c * column_stride] >> 16);
            }
    }
}

/*
 * from: for each of `count` blocks [outer * inner (* 2) tokens, heads, groups * columns (* 2)], contiguous; whichever of
 * the two makes pairs. shape: heads, outer, inner, groups, columns. strides: of a block and of each of these in `to`, in
 * pairs.
 */
void kvserve_tiles(
    int of_tokens, int64_t count, const int64_t *blocks, const uint16_t *from, const int64_t *shape,
    const int64_t *strides, uint32_t *to)
{
    const int64_t heads = shape[0], outer = shape[1], inner = shape[2], groups = shape[3], columns = shape[4];
    const int64_t dim = groups * columns * (of_tokens ? 1 : 2), row = heads * dim;
    const int64_t step = inner * (of_tokens ? 2 : 1);
    for (int64_t t = 0; t < count * outer; t++)
        for (int64_t h = 0; h < heads; h++) {
            uint32_t *out = to + blocks[t / outer] * strides[0] + t % outer * strides[2] + h * strides[1];
            const uint16_t *in = from + t * step * row + h * dim;
            if (!of_tokens)
                dimensions(in, row, out, inner, strides[3], groups * columns, columns, strides[4], strides[5]);
            else
                for (int64_t i = 0; i < inner; i++)
                    tokens(in + 2 * i * row, row, out + i * strides[3], groups, columns, strides[4], strides[5]);
        }
}

/* The other way: what `kvserve_tiles` has written comes back. */
void kvserve_tiles_back(
    int of_tokens, int64_t count, const int64_t *blocks, uint16_t *to, const int64_t *shape, const int64_t *strides,
    const uint32_t *from)
{
    const int64_t heads = shape[0], outer = shape[1], inner = shape[2], groups = shape[3], columns = shape[4];
    const int64_t dim = groups * columns * (of_tokens ? 1 : 2), row = heads * dim;
    const int64_t step = inner * (of_tokens ? 2 : 1);
    for (int64_t t = 0; t < count * outer; t++)
        for (int64_t h = 0; h < heads; h++) {
            const uint32_t *in = from + blocks[t / outer] * strides[0] + t % outer * strides[2] + h * strides[1];
            uint16_t *out = to + t * step * row + h * dim;
            if (!of_tokens)
                dimensions_back(in, out, row, inner, strides[3], groups * columns, columns, strides[4], strides[5]);
            else
                for (int64_t i = 0; i < inner; i++)
                    tokens_back(in + i * strides[3], out + 2 * i * row, row, groups, columns, strides[4], strides[5]);
        }
}
