/* The linear transform of a piece: group by group, in each blocks of tokens. */
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

/* Columns of a block of which one token takes so many bytes. */
static int64_t block_columns(int64_t tokens, int64_t bytes)
{
    int64_t n = BLOCK_BYTES / (bytes + 1) / 32;
    n = n < 1 ? 1 : least(n, MOST_COLUMNS);
    return least(n, up(tokens, 32) / 32);
}

int kvserve_bench_open(
    Bench *bench, const Piece *p, const Group *groups, int64_t count, int64_t tokens, int level, int is_inverse)
{
    int64_t columns = MOST_COLUMNS, bytes = 0;
    for (int64_t i = 0; i < count; i++) {
        const Group *g = groups + i;
        columns = least(columns, block_columns(tokens, is_inverse ? 2 * up(g->components, 32) : up(g->width, 64)));
    }
    for (int64_t i = 0; i < count; i++) {
        const Group *g = groups + i;
        int64_t n = is_inverse ? kvserve_linear_inverse_bytes(p, g, columns) : kvserve_linear_forward_bytes(g, columns);
        bytes = n > bytes ? n : bytes;
    }
    void *memory;
    if (posix_memalign(&memory, 4096, (size_t)bytes) != 0)
        return NO_MEMORY;
    bench->memory = memory;
    bench->columns = columns;
    bench->level = level;
    bench->is_inverse = is_inverse;
    if (level >= TILES)
        tiles_on();
    return DONE;
}

int kvserve_linear_runs(const Piece *p, const Run *runs, int64_t count, const Bench *bench)
{
    Column columns[MOST_COLUMNS];
    int64_t filled = 0;
    int status = DONE;
    for (int64_t i = 0; i < count; i++)
        for (int64_t start = 0; start < runs[i].tokens && status == DONE; start += 32) {
            columns[filled].run = runs + i;
            columns[filled].start = start;
            columns[filled].tokens = least(runs[i].tokens - start, 32);
            filled++;
            const int is_last = i == count - 1 && start + 32 >= runs[i].tokens;
            if (filled < bench->columns && !is_last)
                continue;
            status = bench->is_inverse ? kvserve_linear_inverse_block(p, columns, filled, bench)
                                       : kvserve_linear_forward_block(p, columns, filled, bench);
            filled = 0;
        }
    return status;
}

void kvserve_bench_close(Bench *bench)
{
    if (bench->level >= TILES)
        _tile_release();
    free(bench->memory);
}

#pragma GCC pop_options
#else
int kvserve_bench_open(
    Bench *bench, const Piece *p, const Group *groups, int64_t count, int64_t tokens, int level, int is_inverse)
{
    (void)bench, (void)p, (void)groups, (void)count, (void)tokens, (void)level, (void)is_inverse;
    return REFUSED;
}

int kvserve_linear_runs(const Piece *p, const Run *runs, int64_t count, const Bench *bench)
{
    (void)p, (void)runs, (void)count, (void)bench;
    return REFUSED;
}

void kvserve_bench_close(Bench *bench)
{
    (void)bench;
}
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

static int run(const Piece *piece, const Group *groups, int64_t count, int16_t *levels, int level, int is_inverse)
{
    Bench bench;
    int status = kvserve_bench_open(&bench, piece, groups, count, piece->tokens, level, is_inverse);
    if (status != DONE)
        return status;
    for (int64_t i = 0; i < count && status == DONE; i++) {
        const Run all = {groups + i, 0, piece->tokens, levels};
        status = kvserve_linear_runs(piece, &all, 1, &bench);
        levels += groups[i].components * piece->tokens;
    }
    kvserve_bench_close(&bench);
    return status;
}

/* Write the levels [components of all groups, tokens] of a piece; the level is at least INT8_DOTS. */
int kvserve_linear_forward(int level, const Piece *piece, const Group *groups, int64_t count, int16_t *levels)
{
    return run(piece, groups, count, levels, level, 0);
}

/* Write the values of a piece; the level is at least INT8_DOTS. */
int kvserve_linear_inverse(int level, const Piece *piece, const Group *groups, int64_t count, const int16_t *levels)
{
    return run(piece, groups, count, (int16_t *)levels, level, 1);
}
