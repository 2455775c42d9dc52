/* Cache values to levels. */
#include "linear.h"

#ifdef KVSERVE_LINEAR

INLINE __m512 value16(const char *p, int64_t i, __mmask16 m, int type, int whole)
{
    if (type == FLOAT32)
        return load((const float *)p + i, m, whole);
    const uint16_t *at = (const uint16_t *)p + i;
    __m256i half = whole ? _mm256_loadu_si256((const __m256i *)at) : _mm256_maskz_loadu_epi16(m, at);
    if (type == FLOAT16)
        return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* Centre and scale 16 values, keep them, and return the greater magnitudes, which compare as their bits do. */
INLINE __m512i keep(
    __m512 v, const float *mean, const float *scale, float *to, __mmask16 m, __m512i peak, int whole)
{
    v = _mm512_sub_ps(v, load(mean, m, whole));
    v = _mm512_mul_ps(v, load(scale, m, whole));
    if (whole)
        _mm512_storeu_ps(to, v);
    else
        _mm512_mask_storeu_ps(to, m, v);
    __m512i bits = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
    return _mm512_max_epu32(peak, bits);
}

INLINE __m512i gather_slot(
    const Piece *p, const Group *g, int64_t s, int64_t t, float *scaled, __m512i peak, int type, int whole)
{
    const char *from = slot_values(p, g, s) + t * p->token_stride;
    const int64_t dim = p->dim, n = p->pairs;
    const float *mean = g->mean + s * dim, *scale = g->inv_scale + s * dim;
    float *to = scaled + s * dim;
    int64_t done = 0;
    prefetch_ahead(p, from);
    if (g->rotations[s] >= 0) {
        const float *cos = p->cos + (g->rotations[s] * p->tokens + t) * n;
        const float *sin = p->sin + (g->rotations[s] * p->tokens + t) * n;
        for (int64_t i = 0; i < n; i += 16) {
            const __mmask16 m = first(n - i), low = first(2 * (n - i)), high = first(2 * (n - i) - 16);
            const int64_t j = 2 * i;
            __m512 c = load(cos + i, m, whole), d = load(sin + i, m, whole), a, b;
            if (p->is_interleaved) {
                unzip(value16(from, j, low, type, whole), value16(from, j + 16, high, type, whole), &a, &b);
            } else {
                a = value16(from, i, m, type, whole);
                b = value16(from, n + i, m, type, whole);
            }
            __m512 u = _mm512_add_ps(_mm512_mul_ps(a, c), _mm512_mul_ps(b, d));
            __m512 v = _mm512_sub_ps(_mm512_mul_ps(b, c), _mm512_mul_ps(a, d));
            if (p->is_interleaved) {
                zip(u, v, &a, &b);
                peak = keep(a, mean + j, scale + j, to + j, low, peak, whole);
                peak = keep(b, mean + j + 16, scale + j + 16, to + j + 16, high, peak, whole);
            } else {
                peak = keep(u, mean + i, scale + i, to + i, m, peak, whole);
                peak = keep(v, mean + n + i, scale + n + i, to + n + i, m, peak, whole);
            }
        }
        done = 2 * n;
    }
    for (int64_t i = done; i < dim; i += 16) {
        const __mmask16 m = first(dim - i);
        peak = keep(value16(from, i, m, type, whole), mean + i, scale + i, to + i, m, peak, whole);
    }
    return peak;
}

/* Make the int8 values of one token, `padded` of them. Returns its shift, above 31 if float32 or int8 can't do it. */
INLINE int prepare_token(
    const Piece *p, const Group *g, int64_t t, float *scaled, int8_t *values, int64_t padded, int type, int whole)
{
    __m512i peak = _mm512_setzero_si512();
    for (int64_t s = 0; s < g->slots; s++)
        peak = gather_slot(p, g, s, t, scaled, peak, type, whole);
    /* the exponent of the least 127 * 2^e that is no smaller */
    int e = (int)((_mm512_reduce_max_epu32(peak) + 0x1ffffu) >> 23) - 133;
    e = e < 0 ? 0 : e;
    if (e > 31)
        return e;
    const __m512 down = _mm512_castsi512_ps(_mm512_set1_epi32((127 - e) << 23));
    for (int64_t i = 0; i < padded; i += 64)
        for (int64_t j = i; j < i + 64; j += 16) {
            __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(scaled + j), down));
            _mm_storeu_si128((__m128i *)(values + j), _mm512_cvtepi32_epi8(v));
        }
    return e;
}

INLINE int prepare_rows(
    const Piece *p, const Column *column, int64_t start, int64_t padded, float *scaled, int8_t *rows, float *powers,
    int type, int whole)
{
    const Run *run = column->run;
    for (int64_t i = 0; i < 16; i++) {
        int e = 0;
        if (start + i < column->tokens)
            e = prepare_token(
                p, run->group, token_of(p, run->start + column->start + start + i), scaled, rows + i * padded, padded,
                type, whole);
        else
            memset(rows + i * padded, 0, padded);
        if (e > 31)
            return REFUSED;
        powers[i] = (float)(1u << e);
    }
    return DONE;
}

static int prepare_16(
    const Piece *p, const Column *column, int64_t start, int64_t padded, float *scaled, int8_t *rows, float *powers)
{
    const int whole = p->dim % 16 == 0 && p->pairs % 16 == 0;
    if (p->type == BFLOAT16 && whole)
        return prepare_rows(p, column, start, padded, scaled, rows, powers, BFLOAT16, 1);
    if (p->type == BFLOAT16)
        return prepare_rows(p, column, start, padded, scaled, rows, powers, BFLOAT16, 0);
    if (p->type == FLOAT16)
        return prepare_rows(p, column, start, padded, scaled, rows, powers, FLOAT16, 0);
    return prepare_rows(p, column, start, padded, scaled, rows, powers, FLOAT32, 0);
}

/* Lay 16 rows into tiles; the dot products take unsigned values, 128 more. */
static void lay_tiles(const int8_t *rows, int64_t padded, int8_t *tiles, int flip)
{
    const __m512i sign = _mm512_set1_epi8((char)flip);
    for (int64_t j = 0; j < padded; j += 64) {
        __m512i r[16];
        for (int i = 0; i < 16; i++)
            r[i] = _mm512_xor_si512(_mm512_load_si512(rows + i * padded + j), sign);
        transpose16(r);
        for (int i = 0; i < 16; i++)
            _mm512_store_si512(tiles + j * 16 + i * 64, r[i]);
    }
}

/* y[32 components][32 tokens] of k tiles deep. */
static void multiply_tiles(const int8_t *a, const int8_t *b, int64_t k, int32_t *y)
{
    const int8_t *a1 = a + k * 1024, *b1 = b + k * 1024;
    READ_MEMORY;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t j = 0; j < k; j++) {
        _tile_loadd(4, a + j * 1024, 64);
        _tile_loadd(6, b + j * 1024, 64);
        _tile_loadd(5, a1 + j * 1024, 64);
        _tile_loadd(7, b1 + j * 1024, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, y, 128);
    _tile_stored(1, y + 16, 128);
    _tile_stored(2, y + 512, 128);
    _tile_stored(3, y + 528, 128);
}

static void multiply_dots(const int8_t *a, const int8_t *b, int64_t k, const int32_t *bias, int32_t *y)
{
    for (int c = 0; c < 32; c += 8) {
        const int8_t *rows = a + (c / 16) * k * 1024 + (c % 16) * 64;
        __m512i sum[8][2];
        for (int i = 0; i < 8; i++)
            sum[i][0] = sum[i][1] = _mm512_set1_epi32(-bias[c + i]);
        for (int64_t j = 0; j < k; j++)
            for (int quad = 0; quad < 16; quad++) {
                __m512i b0 = _mm512_load_si512(b + j * 1024 + quad * 64);
                __m512i b1 = _mm512_load_si512(b + (k + j) * 1024 + quad * 64);
                for (int i = 0; i < 8; i++) {
                    __m512i w = _mm512_set1_epi32(*(const int32_t *)(rows + j * 1024 + i * 64 + quad * 4));
                    sum[i][0] = _mm512_dpbusd_epi32(sum[i][0], b0, w);
                    sum[i][1] = _mm512_dpbusd_epi32(sum[i][1], b1, w);
                }
            }
        for (int i = 0; i < 8; i++) {
            _mm512_store_si512(y + (c + i) * 32, sum[i][0]);
            _mm512_store_si512(y + (c + i) * 32 + 16, sum[i][1]);
        }
    }
}

INLINE __m256i level16(__m512i y, __m512 power, __m512 factor, __m512 offset)
{
    __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_abs_epi32(y)), power);
    v = _mm512_add_ps(_mm512_mul_ps(v, factor), offset);
    __m512i q = _mm512_cvttps_epi32(_mm512_min_ps(v, _mm512_set1_ps(32767.0f)));
    return _mm512_cvtepi32_epi16(_mm512_mask_sub_epi32(q, _mm512_movepi32_mask(y), _mm512_setzero_si512(), q));
}

/* Levels of 32 components, from c0 on, of a column. */
static void quantise(const int32_t *y, const Column *column, int64_t c0)
{
    const Group *g = column->run->group;
    const int64_t stride = column->run->tokens, tokens = column->tokens;
    int16_t *levels = column->run->levels + column->start;
    const __m512 p0 = _mm512_loadu_ps(column->powers), p1 = _mm512_loadu_ps(column->powers + 16);
    const __mmask32 m = (__mmask32)first(tokens) | (__mmask32)first(tokens - 16) << 16;
    const int64_t count = least(g->components - c0, 32);
    for (int64_t c = 0; c < count; c++) {
        const __m512 factor = _mm512_set1_ps(g->factor[c0 + c]), offset = _mm512_set1_ps(g->offset[c0 + c]);
        __m256i q0 = level16(_mm512_load_si512(y + c * 32), p0, factor, offset);
        __m256i q1 = level16(_mm512_load_si512(y + c * 32 + 16), p1, factor, offset);
        __m512i q = _mm512_inserti64x4(_mm512_castsi256_si512(q0), q1, 1);
        _mm512_mask_storeu_epi16(levels + (c0 + c) * stride, m, q);
    }
}

int64_t kvserve_linear_forward_bytes(const Group *g, int64_t columns)
{
    return up(g->width, 64) * (columns * 32 + 16 + (int64_t)sizeof(float));
}

int kvserve_linear_forward_block(const Piece *p, Column *columns, int64_t count, const Bench *bench)
{
    const Group *g = columns->run->group;
    const int64_t padded = up(g->width, 64), k = padded / 64;
    int8_t *tiles = (int8_t *)bench->memory, *rows = tiles + count * 32 * padded;
    float *scaled = (float *)(rows + 16 * padded);
    int32_t y[2][32 * 32] __attribute__((aligned(64)));
    int64_t most = 0;
    memset(scaled + g->width, 0, (size_t)(padded - g->width) * sizeof(float));
    for (int64_t i = 0; i < count; i++) {
        Column *column = columns + i;
        column->tiles = (char *)tiles + i * 32 * padded;
        most = column->run->group->components > most ? column->run->group->components : most;
        for (int64_t t = 0; t < 32; t += 16) {
            if (prepare_16(p, column, t, padded, scaled, rows, column->powers + t) != DONE)
                return REFUSED;
            lay_tiles(rows, padded, (int8_t *)column->tiles + t * padded, bench->level < TILES ? -128 : 0);
        }
    }
    /* one block is quantised while the next is multiplied */
    const Column *last = NULL;
    int64_t last_c = 0, turn = 0;
    for (int64_t c = 0; c < most; c += 32)
        for (int64_t i = 0; i < count; i++) {
            const Column *column = columns + i;
            if (c >= column->run->group->components)
                continue;
            const int8_t *b = (const int8_t *)column->tiles;
            if (bench->level >= TILES)
                multiply_tiles(g->matrix + c * padded, b, k, y[turn]);
            else
                multiply_dots(g->matrix + c * padded, b, k, g->bias + c, y[turn]);
            turn ^= 1;
            if (last)
                quantise(y[turn], last, last_c);
            last = column;
            last_c = c;
        }
    if (last)
        quantise(y[turn ^ 1], last, last_c);
    return DONE;
}

#pragma GCC pop_options
#endif
