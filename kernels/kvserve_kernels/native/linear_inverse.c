/* Levels to cache values. */
#include "linear.h"

#ifdef KVSERVE_LINEAR

/* Indices that put the upper half of 32 words between those of the lower. */
INLINE __m512i interleave16(void)
{
    const __m512i low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16));
}

/* sign(q) (|q| + delta) unit */
INLINE __m512 dequantise(const int16_t *levels, __mmask16 m, float delta, float unit)
{
    __m512i q = _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(m, levels));
    __m512 r = _mm512_cvtepi32_ps(_mm512_abs_epi32(q));
    r = _mm512_maskz_add_ps(_mm512_test_epi32_mask(q, q), r, _mm512_set1_ps(delta));
    r = _mm512_mul_ps(r, _mm512_set1_ps(unit));
    return _mm512_or_ps(r, _mm512_and_ps(_mm512_castsi512_ps(q), _mm512_set1_ps(-0.0f)));
}

/* Round pairs (x, y) to bfloat16. */
INLINE __m512i round_pairs(__m512 x, __m512 y, int has_bf16)
{
    if (has_bf16)
        return _mm512_permutexvar_epi16(interleave16(), (__m512i)_mm512_cvtne2ps_pbh(y, x));
    __m512i upper = _mm512_and_si512(round_bf16(y), _mm512_set1_epi32((int32_t)0xffff0000u));
    return _mm512_or_si512(_mm512_srli_epi32(round_bf16(x), 16), upper);
}

/* Lay the levels of `count` tokens, of which `left` exist, into tiles: row by row, then transposed in place. */
INLINE void expand(
    const int16_t *levels, int64_t stride, const Group *g, int64_t count, int64_t left, char *tiles, int has_bf16)
{
    const int64_t depth = up(g->components, 32);
    for (int64_t c0 = 0; c0 < depth; c0 += 32) {
        char *const to = tiles + c0 * 32;
        for (int64_t i = 0; i < 16; i++) {
            const int64_t c = c0 + 2 * i;
            const int16_t *row0 = c < g->components ? levels + c * stride : NULL;
            const int16_t *row1 = c + 1 < g->components ? levels + (c + 1) * stride : NULL;
            for (int64_t t = 0; t < count; t += 16) {
                const __mmask16 m = first(left - t);
                __m512 x = row0 ? dequantise(row0 + t, m, g->delta[c], g->unit) : _mm512_setzero_ps();
                __m512 y = row1 ? dequantise(row1 + t, m, g->delta[c + 1], g->unit) : _mm512_setzero_ps();
                _mm512_store_si512(to + t * depth * 2 + i * 64, round_pairs(x, y, has_bf16));
            }
        }
        for (int64_t t = 0; t < count; t += 16) {
            char *const tile = to + t * depth * 2;
            __m512i r[16];
            for (int i = 0; i < 16; i++)
                r[i] = _mm512_load_si512(tile + i * 64);
            transpose16(r);
            for (int i = 0; i < 16; i++)
                _mm512_store_si512(tile + i * 64, r[i]);
        }
    }
}

/* x[32 tokens][32 values], rows of `stride` floats, of k tiles deep; the matrix is `deep` tiles deep. */
static void multiply_tiles(const char *a, const char *b, int64_t k, int64_t deep, float *x, int64_t stride)
{
    const char *a1 = a + k * 1024, *b1 = b + deep * 1024;
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
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, x, stride * 4);
    _tile_stored(1, x + 16, stride * 4);
    _tile_stored(2, x + 16 * stride, stride * 4);
    _tile_stored(3, x + 16 * stride + 16, stride * 4);
}

static void multiply_dots(const char *a, const char *b, int64_t k, int64_t deep, float *x, int64_t stride)
{
    for (int t = 0; t < 32; t += 8) {
        const char *rows = a + (t / 16) * k * 1024 + (t % 16) * 64;
        __m512 sum[8][2];
        for (int i = 0; i < 8; i++)
            sum[i][0] = sum[i][1] = _mm512_setzero_ps();
        for (int64_t j = 0; j < k; j++)
            for (int pair = 0; pair < 16; pair++) {
                __m512bh b0 = (__m512bh)_mm512_load_si512(b + j * 1024 + pair * 64);
                __m512bh b1 = (__m512bh)_mm512_load_si512(b + (deep + j) * 1024 + pair * 64);
                for (int i = 0; i < 8; i++) {
                    const int32_t *at = (const int32_t *)(rows + j * 1024 + i * 64 + pair * 4);
                    __m512bh w = (__m512bh)_mm512_set1_epi32(*at);
                    sum[i][0] = _mm512_dpbf16_ps(sum[i][0], w, b0);
                    sum[i][1] = _mm512_dpbf16_ps(sum[i][1], w, b1);
                }
            }
        for (int i = 0; i < 8; i++) {
            _mm512_storeu_ps(x + (t + i) * stride, sum[i][0]);
            _mm512_storeu_ps(x + (t + i) * stride + 16, sum[i][1]);
        }
    }
}

/* The same in float32. */
static void multiply_floats(const char *a, const char *b, int64_t k, int64_t deep, float *x, int64_t stride)
{
    const __m512i upper = _mm512_set1_epi32((int32_t)0xffff0000u);
    for (int t = 0; t < 32; t += 8) {
        const char *rows = a + (t / 16) * k * 1024 + (t % 16) * 64;
        __m512 sum[8][2];
        for (int i = 0; i < 8; i++)
            sum[i][0] = sum[i][1] = _mm512_setzero_ps();
        for (int64_t j = 0; j < k; j++) {
            /* in memory, from where a number is broadcast at no cost */
            float numbers[8][2][16] __attribute__((aligned(64)));
            for (int i = 0; i < 8; i++) {
                __m512i both = _mm512_load_si512(rows + j * 1024 + i * 64);
                _mm512_store_si512(numbers[i][0], _mm512_slli_epi32(both, 16));
                _mm512_store_si512(numbers[i][1], _mm512_and_si512(both, upper));
            }
            READ_MEMORY;
            for (int pair = 0; pair < 16; pair++) {
                __m512i b0 = _mm512_load_si512(b + j * 1024 + pair * 64);
                __m512i b1 = _mm512_load_si512(b + (deep + j) * 1024 + pair * 64);
                const __m512 low0 = _mm512_castsi512_ps(_mm512_slli_epi32(b0, 16));
                const __m512 low1 = _mm512_castsi512_ps(_mm512_slli_epi32(b1, 16));
                const __m512 high0 = _mm512_castsi512_ps(_mm512_and_si512(b0, upper));
                const __m512 high1 = _mm512_castsi512_ps(_mm512_and_si512(b1, upper));
                for (int i = 0; i < 8; i++) {
                    const __m512 u = _mm512_set1_ps(numbers[i][0][pair]), v = _mm512_set1_ps(numbers[i][1][pair]);
                    sum[i][0] = _mm512_fmadd_ps(u, low0, sum[i][0]);
                    sum[i][1] = _mm512_fmadd_ps(u, low1, sum[i][1]);
                    sum[i][0] = _mm512_fmadd_ps(v, high0, sum[i][0]);
                    sum[i][1] = _mm512_fmadd_ps(v, high1, sum[i][1]);
                }
            }
        }
        for (int i = 0; i < 8; i++) {
            _mm512_storeu_ps(x + (t + i) * stride, sum[i][0]);
            _mm512_storeu_ps(x + (t + i) * stride + 16, sum[i][1]);
        }
    }
}

INLINE void store16(char *p, int64_t i, __mmask16 m, __m512 v, int type, int whole)
{
    if (type == FLOAT32) {
        _mm512_mask_storeu_ps((float *)p + i, m, v);
        return;
    }
    uint16_t *at = (uint16_t *)p + i;
    __m256i half;
    if (type == FLOAT16) {
        v = _mm512_max_ps(_mm512_min_ps(v, _mm512_set1_ps(65504.0f)), _mm512_set1_ps(-65504.0f));
        half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
        half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(v), 16));
    }
    if (whole)
        _mm256_storeu_si256((__m256i *)at, half);
    else
        _mm256_mask_storeu_epi16(at, m, half);
}

INLINE __m512 whole16(const float *x, const float *mean, __mmask16 m, int whole)
{
    return _mm512_add_ps(load(x, m, whole), load(mean, m, whole));
}

/* Add the means to one token of a slot, turn it, and write it where it belongs. */
INLINE void finish_token(const Piece *p, const Group *g, int64_t s, int64_t t, const float *x, int type, int whole)
{
    char *to = slot_values(p, g, s) + t * p->token_stride;
    const int64_t dim = p->dim, n = p->pairs;
    const float *mean = g->mean + s * dim;
    int64_t done = 0;
    prefetch_ahead(p, to);
    if (g->rotations[s] >= 0) {
        const float *cos = p->cos + (g->rotations[s] * p->tokens + t) * n;
        const float *sin = p->sin + (g->rotations[s] * p->tokens + t) * n;
        for (int64_t i = 0; i < n; i += 16) {
            const __mmask16 m = first(n - i), low = first(2 * (n - i)), high = first(2 * (n - i) - 16);
            const int64_t j = 2 * i;
            __m512 c = load(cos + i, m, whole), d = load(sin + i, m, whole), a, b;
            if (p->is_interleaved) {
                unzip(whole16(x + j, mean + j, low, whole), whole16(x + j + 16, mean + j + 16, high, whole), &a, &b);
            } else {
                a = whole16(x + i, mean + i, m, whole);
                b = whole16(x + n + i, mean + n + i, m, whole);
            }
            __m512 u = _mm512_sub_ps(_mm512_mul_ps(a, c), _mm512_mul_ps(b, d));
            __m512 v = _mm512_add_ps(_mm512_mul_ps(b, c), _mm512_mul_ps(a, d));
            if (p->is_interleaved) {
                zip(u, v, &a, &b);
                store16(to, j, low, a, type, whole);
                store16(to, j + 16, high, b, type, whole);
            } else {
                store16(to, i, m, u, type, whole);
                store16(to, n + i, m, v, type, whole);
            }
        }
        done = 2 * n;
    }
    for (int64_t i = done; i < dim; i += 16) {
        const __mmask16 m = first(dim - i);
        store16(to, i, m, whole16(x + i, mean + i, m, whole), type, whole);
    }
}

INLINE void finish_tokens(
    const Piece *p, const Column *column, int64_t s, const float *x, int64_t stride, int type, int whole)
{
    const Run *run = column->run;
    for (int64_t t = 0; t < column->tokens; t++)
        finish_token(p, run->group, s, token_of(p, run->start + column->start + t), x + t * stride, type, whole);
}

static void finish(const Piece *p, const Column *column, int64_t s, const float *x, int64_t stride)
{
    const int whole = p->dim % 16 == 0 && p->pairs % 16 == 0;
    if (p->type == BFLOAT16 && whole)
        finish_tokens(p, column, s, x, stride, BFLOAT16, 1);
    else if (p->type == BFLOAT16)
        finish_tokens(p, column, s, x, stride, BFLOAT16, 0);
    else if (p->type == FLOAT16)
        finish_tokens(p, column, s, x, stride, FLOAT16, 0);
    else
        finish_tokens(p, column, s, x, stride, FLOAT32, 0);
}

int64_t kvserve_linear_inverse_bytes(const Piece *p, const Group *g, int64_t columns)
{
    return columns * 32 * up(g->components, 32) * 2 + 2 * 32 * up(p->dim, 32) * (int64_t)sizeof(float);
}

int kvserve_linear_inverse_block(const Piece *p, Column *columns, int64_t count, const Bench *bench)
{
    const Group *g = columns->run->group;
    const int64_t padded = up(p->dim, 32), stored = up(g->stored, 32), deep = stored / 32;
    float *x[2] = {(float *)bench->memory, (float *)bench->memory + 32 * padded};
    char *tiles = bench->memory + 2 * 32 * padded * sizeof(float);
    for (int64_t i = 0, next; i < count; i = next) {
        /* neighbours of one run are laid out together */
        const Run *run = columns[i].run;
        const int64_t depth = up(run->group->components, 32);
        for (next = i; next < count && columns[next].run == run; next++)
            columns[next].tiles = tiles + (next - i) * 32 * depth * 2;
        const int16_t *levels = run->levels + columns[i].start;
        const int64_t wide = (next - i) * 32, left = run->tokens - columns[i].start;
        if (bench->level >= BF16_DOTS)
            expand(levels, run->tokens, run->group, wide, left, tiles, 1);
        else
            expand(levels, run->tokens, run->group, wide, left, tiles, 0);
        tiles += wide * depth * 2;
    }
    /* one block is finished while the next is multiplied */
    const int64_t blocks = count * g->slots;
    for (int64_t i = 0; i <= blocks; i++) {
        if (i < blocks) {
            const Column *column = columns + i % count;
            const int64_t k = up(column->run->group->components, 32) / 32;
            const char *b = (const char *)g->inverse + i / count * padded * stored * 2;
            for (int64_t w = 0; w < padded; w += 32)
                if (bench->level >= TILES)
                    multiply_tiles(column->tiles, b + w * stored * 2, k, deep, x[i & 1] + w, padded);
                else if (bench->level >= BF16_DOTS)
                    multiply_dots(column->tiles, b + w * stored * 2, k, deep, x[i & 1] + w, padded);
                else
                    multiply_floats(column->tiles, b + w * stored * 2, k, deep, x[i & 1] + w, padded);
        }
        if (i > 0)
            finish(p, columns + (i - 1) % count, (i - 1) / count, x[(i - 1) & 1], padded);
    }
    return DONE;
}

#pragma GCC pop_options
#endif
