/* Whether no number of an array is NaN or infinite: loops without exits, which become SIMD. */
#include <stdint.h>

#define STRETCH 4096

/* mantissa: its bits: 7 for bfloat16, 10 for float16, 23 for float32. */
int kvserve_finite(const void *values, int64_t count, int mantissa)
{
    for (int64_t first = 0; first < count; first += STRETCH) {
        const int64_t stop = count - first < STRETCH ? count : first + STRETCH;
        if (mantissa == 23) {
            const int32_t *words = values;
            int32_t bad = 0;
            for (int64_t i = first; i < stop; i++)
                bad |= (words[i] & 0x7fffffff) > 0x7f7fffff;
            if (bad)
                return 0;
        } else {
            const int16_t *words = values;
            const int16_t largest = mantissa == 7 ? 0x7f7f : 0x7bff;
            int16_t bad = 0;
            for (int64_t i = first; i < stop; i++)
                bad |= (int16_t)((words[i] & 0x7fff) > largest);
            if (bad)
                return 0;
        }
    }
    return 1;
}
