/* What the coders look up, made from frequencies. */
#include "rans.h"

size_t kvserve_table_nbytes(void)
{
    return sizeof(Table);
}

static void fill_tree(Table *t, const uint32_t *starts, int node, int first, int count)
{
    /* symbols first to first + count - 1 are below the node; `count` is a power of two */
    if (count == 1)
        return;
    t->tree[node] = (uint16_t)(starts[first + count / 2] - 1);
    fill_tree(t, starts, 2 * node, first, count / 2);
    fill_tree(t, starts, 2 * node + 1, first + count / 2, count / 2);
}

static void fill_table(Table *t, const uint32_t *frequencies, int symbols)
{
    uint32_t starts[SYMBOLS];
    uint32_t sum = 0;
    for (int s = 0; s < SYMBOLS; s++) {
        uint32_t f = frequencies[s];
        starts[s] = s < symbols ? sum : TOTAL;
        if (f == TOTAL)
            t->sole = s;
        t->frequency[s] = (uint16_t)f;
        t->start[s] = (uint16_t)sum;
        t->pair[s] = sum << 16 | f;
        if (f > 0) {
            uint64_t both = ((uint64_t)1 << 32) / f;
            both = both > UINT32_MAX ? UINT32_MAX : both;
            t->whole[s] = (uint16_t)(both >> 16);
            t->part[s] = (uint16_t)both;
            t->reciprocal[s] = ((uint64_t)1 << 44) / f + 1;
            t->inverse[s] = (float)((1.0 - 0x1p-22) / f);
        }
        sum += f;
    }
    if (t->sole >= 0)
        return;
    t->depth = 1;
    while (1 << t->depth < symbols)
        t->depth++;
    /* the loop for raw low bits knows one depth only */
    if (t->low_bits > 0)
        t->depth = 5;
    fill_tree(t, starts, 1, 0, 1 << t->depth);
    for (int s = 0; s < 1 << t->depth; s++) {
        /* the number of a leaf is 2^depth + s, of which a permutation sees five bits */
        int leaf = ((1 << t->depth) + s) & (SYMBOLS - 1);
        t->scaled[leaf] = (uint16_t)(t->frequency[s] << 4);
        t->leaf_start[leaf] = (uint16_t)starts[s];
    }
}

/* frequencies: [count][32] of sum 4096 each; symbols: how many of them each table has, 1 to 32. */
void kvserve_tables(
    int64_t count, const int32_t *bases, const int32_t *low_bits, const int32_t *escapes, const int32_t *symbols,
    const uint32_t *frequencies, Table *out)
{
    for (int64_t i = 0; i < count; i++) {
        Table *t = &out[i];
        memset(t, 0, sizeof *t);
        t->base = bases[i];
        t->low_bits = low_bits[i];
        t->escape = escapes[i] ? symbols[i] - 1 : -1;
        t->outside = escapes[i] ? symbols[i] - 1 : 0;
        t->span = escapes[i] ? (symbols[i] - 1) << low_bits[i] : 65536;
        t->sole = -1;
        fill_table(t, frequencies + i * SYMBOLS, symbols[i]);
    }
}

/* out: [count][4096], for each slot frequency - 1 << 20 | offset << 8 | symbol. */
void kvserve_slots(int64_t count, const uint32_t *frequencies, uint32_t *out)
{
    for (int64_t i = 0; i < count; i++)
        for (uint32_t s = 0; s < SYMBOLS; s++) {
            uint32_t f = frequencies[i * SYMBOLS + s];
            for (uint32_t offset = 0; offset < f; offset++)
                *out++ = (f - 1) << 20 | offset << 8 | s;
        }
}
