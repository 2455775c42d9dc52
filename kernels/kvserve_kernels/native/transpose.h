/* Squares of 8- and 16-bit integers, turned: what transpositions are made of. */
#ifndef KVSERVE_TRANSPOSE_H
#define KVSERVE_TRANSPOSE_H

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && !defined(KVSERVE_PORTABLE_ONLY)
#include <emmintrin.h>
#define TILE 8

static inline __m128i load_row(const void *from, int width)
{
    if (width == 1)
        return _mm_unpacklo_epi8(_mm_loadl_epi64(from), _mm_setzero_si128());
    return _mm_loadu_si128(from);
}

static inline void store_row(void *to, int width, __m128i row)
{
    if (width == 1)
        /* without the mask it would saturate */
        _mm_storel_epi64(to, _mm_packus_epi16(_mm_and_si128(row, _mm_set1_epi16(255)), row));
    else
        _mm_storeu_si128(to, row);
}

/* 8 x 8; strides in bytes. */
static inline void tile(
    const uint8_t *from, int64_t from_stride, int from_width, uint8_t *to, int64_t to_stride, int to_width)
{
    __m128i a[TILE], b[TILE];
    for (int i = 0; i < TILE; i++)
        a[i] = load_row(from + i * from_stride, from_width);
    for (int i = 0; i < TILE; i += 2) {
        b[i] = _mm_unpacklo_epi16(a[i], a[i + 1]);
        b[i + 1] = _mm_unpackhi_epi16(a[i], a[i + 1]);
    }
    for (int i = 0; i < TILE; i += 4)
        for (int k = 0; k < 2; k++) {
            a[i + 2 * k] = _mm_unpacklo_epi32(b[i + k], b[i + k + 2]);
            a[i + 2 * k + 1] = _mm_unpackhi_epi32(b[i + k], b[i + k + 2]);
        }
    for (int k = 0; k < 4; k++) {
        store_row(to + 2 * k * to_stride, to_width, _mm_unpacklo_epi64(a[k], a[k + 4]));
        store_row(to + (2 * k + 1) * to_stride, to_width, _mm_unpackhi_epi64(a[k], a[k + 4]));
    }
}
#else
#define TILE (1 << 30)
static inline void tile(
    const uint8_t *from, int64_t from_stride, int from_width, uint8_t *to, int64_t to_stride, int to_width)
{
    (void)from, (void)from_stride, (void)from_width, (void)to, (void)to_stride, (void)to_width;
}
#endif

#endif
