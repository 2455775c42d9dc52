/* The linear transform of a piece: blocks of tokens, in each all groups, so that groups which share rows find them in a
 * cache. */
#include "linear.h"

#ifdef KVSERVE_LINEAR
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

static void tiles_on(void)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = 64;
        config.rows[i] = 16;
    }
    READ_MEMORY;
    _tile_loadconfig(&config);
}

static int run(const Piece *p, const Group *groups, int64_t count, int level, int is_inverse)
{
    int64_t block = MOST_TOKENS, bytes = 0;
    for (int64_t i = 0; i < count; i++) {
        const Group *g = groups + i;
        block = least(block, block_tokens(p->tokens, is_inverse ? 2 * up(g->components, 32) : up(g->width, 64)));
    }
    for (int64_t i = 0; i < count; i++) {
        const Group *g = groups + i;
        int64_t n = is_inverse ? kvserve_linear_inverse_bytes(p, g, block) : kvserve_linear_forward_bytes(g, block);
        bytes = n > bytes ? n : bytes;
    }
    void *scratch;
    if (posix_memalign(&scratch, 4096, (size_t)bytes) != 0)
        return NO_MEMORY;
    if (level >= TILES)
        tiles_on();
    int status = DONE;
    for (int64_t start = 0; start < p->tokens && status == DONE; start += block) {
        const int64_t tokens = least(block, up(p->tokens - start, 32));
        int16_t *levels = p->levels;
        for (int64_t i = 0; i < count && status == DONE; i++) {
            status = is_inverse ? kvserve_linear_inverse_block(p, groups + i, levels, start, tokens, scratch, level)
                                : kvserve_linear_forward_block(p, groups + i, levels, start, tokens, scratch, level);
            levels += groups[i].components * p->tokens;
        }
    }
    if (level >= TILES)
        _tile_release();
    free(scratch);
    return status;
}
#pragma GCC pop_options
#endif

/* What this processor can run; asks the system for the tile registers. */
int kvserve_linear_widest(void)
{
#ifdef KVSERVE_LINEAR
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vnni"))
        return NO_LINEAR;
    if (!__builtin_cpu_supports("avx512bf16"))
        return INT8_DOTS;
    unsigned a, b, c, d;
    const unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25; /* bfloat16, tiles, int8 */
    /* ARCH_REQ_XCOMP_PERM for the tiles' data */
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & wanted) == wanted && syscall(SYS_arch_prctl, 0x1023, 18) == 0)
        return TILES;
    /* Intel's dot products of bfloat16 are slower than its float32 */
    return __builtin_cpu_is("intel") ? INT8_DOTS : BF16_DOTS;
#else
    return NO_LINEAR;
#endif
}

/* Write the levels of a piece; the level is at least INT8_DOTS. */
int kvserve_linear_forward(int level, const Piece *piece, const Group *groups, int64_t count)
{
#ifdef KVSERVE_LINEAR
    return run(piece, groups, count, level, 0);
#else
    (void)level, (void)piece, (void)groups, (void)count;
    return REFUSED;
#endif
}

/* Write the values of a piece; the level is at least INT8_DOTS. */
int kvserve_linear_inverse(int level, const Piece *piece, const Group *groups, int64_t count)
{
#ifdef KVSERVE_LINEAR
    return run(piece, groups, count, level, 1);
#else
    (void)level, (void)piece, (void)groups, (void)count;
    return REFUSED;
#endif
}
