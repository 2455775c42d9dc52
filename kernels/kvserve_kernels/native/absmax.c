/* Symmetric quantisation of rows; kvserve_kernels/absmax/absmax_ref.py defines it. Single float32 operations that must
 * not be fused, so every width gives the same. */
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
/* a peak too small to have a float32 reciprocal is coded as zeros */
#define LEAST_PEAK 1e-34f
/* adding it leaves no room for a fraction: halves go to the even integer */
#define ROUND 12582912.0f

INLINE float widened(uint16_t bits)
{
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

INLINE float factor_of(float top, float peak)
{
    return peak > LEAST_PEAK ? top / peak : 0.0f;
}

INLINE uint8_t code_of(float value, float factor, float top)
{
    return (uint8_t)(int32_t)(value * factor + top + ROUND - ROUND);
}

INLINE void encode_bf16(const uint16_t *x, int64_t rows, int64_t dim, float top, uint8_t *codes, uint16_t *peaks)
{
    for (int64_t r = 0; r < rows; r++, x += dim, codes += dim) {
        /* magnitudes compare as their bits do */
        int16_t peak = 0;
        for (int64_t j = 0; j < dim; j++) {
            const int16_t v = (int16_t)(x[j] & 0x7fff);
            peak = v > peak ? v : peak;
        }
        peaks[r] = (uint16_t)peak;
        const float factor = factor_of(top, widened((uint16_t)peak));
        for (int64_t j = 0; j < dim; j++)
            codes[j] = code_of(widened(x[j]), factor, top);
    }
}

INLINE void encode_f32(const float *x, int64_t rows, int64_t dim, float top, uint8_t *codes, float *peaks)
{
    for (int64_t r = 0; r < rows; r++, x += dim, codes += dim) {
        float peak = 0;
        for (int64_t j = 0; j < dim; j++) {
            const float v = __builtin_fabsf(x[j]);
            peak = v > peak ? v : peak;
        }
        peaks[r] = peak;
        const float factor = factor_of(top, peak);
        for (int64_t j = 0; j < dim; j++)
            codes[j] = code_of(x[j], factor, top);
    }
}

#define ENCODE(NAME, TARGET) \
    TARGET static void NAME( \
        const void *x, int64_t rows, int64_t dim, float top, uint8_t *codes, void *peaks, int is_bf16) \
    { \
        if (is_bf16) \
            encode_bf16(x, rows, dim, top, codes, peaks); \
        else \
            encode_f32(x, rows, dim, top, codes, peaks); \
    }

ENCODE(encode_portable, )
#if defined(__x86_64__) && !defined(KVSERVE_PORTABLE_ONLY)
ENCODE(encode_avx2, __attribute__((target("avx2"))))
ENCODE(encode_avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))))
#endif

/* x: [rows, dim] float32 or bfloat16, finite; codes: the same shape; peaks: [rows] in the type of x. */
void kvserve_absmax_encode(
    int level, const void *x, int64_t rows, int64_t dim, float top, uint8_t *codes, void *peaks, int is_bf16)
{
#if defined(__x86_64__) && !defined(KVSERVE_PORTABLE_ONLY)
    if (level == 2) {
        encode_avx512(x, rows, dim, top, codes, peaks, is_bf16);
        return;
    }
    if (level == 1) {
        encode_avx2(x, rows, dim, top, codes, peaks, is_bf16);
        return;
    }
#endif
    (void)level;
    encode_portable(x, rows, dim, top, codes, peaks, is_bf16);
}
