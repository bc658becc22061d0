/* Attention over a trie in pieces (branches.py), with float32's sums.

   One row of queries at a time, for the heads that share a key-value head: its scores, their softmax
   and the values, while all of it is in a core's cache. Queries, keys and values are read where they
   stand, node by node; keys and values of a row's columns are laid out in words first, those above
   all rows once.

   Letters as there: N nodes, R rows, W their width, S columns above the rows, C all columns, a
   multiple of COLUMNS, G key-value heads, F heads of each, D head dimension, a multiple of COLUMNS.
   Of a row's queries, i = w F + f. */

#include <omp.h>

#include "native.h"

#define ROWS 8 /* numbers broadcast at a time */

/* The pieces, and the sizes of a pass. */
typedef struct {
    const int64_t *columns; /* (R, C - P), the nodes behind the columns after those before all */
    const int64_t *rows;    /* (R, W), the nodes of queries */
    const int64_t *place;   /* (N), where a node is among the R W places */
    const number *bias;   /* (R W, C), added to scores */
    const int64_t *trunk;   /* (S - P) */
    const int64_t *ends;    /* (R W), the columns up to the last that a query sees */
    int64_t R, W, P, S, C, G, F, D;
} pieces;

/* Keys and values: (N, 2 G D), rows `stride` apart, and those before all, (2 G, P, D). */
typedef struct {
    const number *both, *before;
    int64_t stride;
} states;

/* The key (part g) or value (part G + g) behind column c of row r. */
static inline const number *behind(const pieces *p, const states *s, int64_t r, int64_t part,
                                     int64_t c) {
    if (c < p->P) return s->before + (part * p->P + c) * p->D;
    return s->both + p->columns[r * (p->C - p->P) + c - p->P] * s->stride + part * p->D;
}

/* Columns from `first`: the words of a column one below another. */
static void lay_down(const pieces *p, const states *s, int64_t r, int64_t part, int64_t first,
                     number *out) {
    for (int64_t c = first; c < p->C; c++) {
        const number *x = behind(p, s, r, part, c);
        for (int64_t d = 0; d < p->D / PER; d++)
            memcpy(out + (d * p->C + c) * PER, x + PER * d, 4);
    }
}

/* Two rows of numbers, as words of one column each; rows of words hold `width`. */
static inline void side_by_side(const number *x, const number *y, int64_t count, int64_t width,
                                number *out) {
#ifdef FLOAT32
    memcpy(out, x, count * sizeof *x);
    memcpy(out + width, y, count * sizeof *y);
#else
    (void)width;
    for (int64_t k = 0; k < count; k += LANES) {
        words both = apart(x + k) | apart(y + k) << 16;
        memcpy(out + 2 * k, &both, sizeof both);
    }
#endif
}

/* Two rows of which `count` of C numbers are known and the others are 0, in the same way. */
static inline void columns_of(const number *x, const number *y, int64_t count, int64_t C,
                              number *out) {
    side_by_side(x, y, count, C, out);
    for (int64_t k = 0; k < 2; k += PER)
        memset(out + (k * C + PER * count), 0, PER * (C - count) * sizeof *out);
}

/* Columns from `first`, which is even: two by two, side by side. */
static void lay_across(const pieces *p, const states *s, int64_t r, int64_t part, int64_t first,
                       number *out) {
    for (int64_t c = first; c < p->C; c += 2)
        side_by_side(behind(p, s, r, part, c), behind(p, s, r, part, c + 1), p->D, p->D,
                     out + c * p->D);
}

/* sums[i] = sum over k < n of the word at a[i] + k step times COLUMNS words at b + k below. */
static inline __attribute__((always_inline)) void multiply(const number *const *a, int64_t step,
                                                           const number *b, int64_t below,
                                                           int64_t n, floats sums[ROWS][2]) {
    floats low[ROWS] = {}, high[ROWS] = {};
    for (int64_t k = 0; k < n; k++) {
        words one = read(b + k * below), two = read(b + k * below + PER * LANES);
#pragma GCC unroll 8
        for (int64_t i = 0; i < ROWS; i++) {
            words word = everywhere(a[i] + k * step);
            low[i] = dot(low[i], word, one);
            high[i] = dot(high[i], word, two);
        }
    }
    for (int64_t i = 0; i < ROWS; i++) sums[i][0] = low[i], sums[i][1] = high[i];
}

/* Of query i of row r: its node, or -1 where the place is filled up. */
static inline int64_t owner(const pieces *p, int64_t r, int64_t i) {
    int64_t at = r * p->W + i / p->F, node = p->rows[at];
    return p->place[node] == at ? node : -1;
}

/* Columns up to the last that one of ROWS queries of row r sees, a multiple of COLUMNS. */
static inline int64_t end_of(const pieces *p, int64_t r, int64_t start) {
    int64_t end = 0;
    for (int64_t w = start / p->F; w < p->W && w * p->F < start + ROWS; w++)
        if (p->ends[r * p->W + w] > end) end = p->ends[r * p->W + w];
    return (end + COLUMNS - 1) / COLUMNS * COLUMNS;
}

/* out = softmax(scale x + bias), of C numbers; x is written over. */
static void softmax(float *x, const number *bias, float scale, int64_t C, number *out) {
    floats most = -INFINITY - (floats){}, sum = {};
    for (int64_t c = 0; c < C; c += LANES) {
        floats y = floats_of(x + c) * scale + widened(bias + c);
        memcpy(x + c, &y, sizeof y);
        most = larger(y, most);
    }
    most = largest(most);
    for (int64_t c = 0; c < C; c += LANES) {
        floats y = exponentials(floats_of(x + c) - most);
        memcpy(x + c, &y, sizeof y);
        sum += y;
    }
    floats share = 1.0f / total(sum);
    for (int64_t c = 0; c < C; c += LANES) put(out + c, share * floats_of(x + c));
}

/* ds = share (x - sum of share x), of C numbers. */
static void softmax_backward(const float *x, const number *share, int64_t C, number *ds) {
    floats sum = {};
    for (int64_t c = 0; c < C; c += LANES) sum += widened(share + c) * floats_of(x + c);
    floats mean = total(sum);
    for (int64_t c = 0; c < C; c += LANES)
        put(ds + c, widened(share + c) * (floats_of(x + c) - mean));
}

/* Numbers that a thread needs room for; a float takes PER. */
int64_t attend_room(const pieces *p) { return 2 * p->C * p->D + PER * ROWS * p->C; }

/* out (N, G F D) of queries q (N, G F D), `stride` apart; shares (G, R, W F, C). */
void attend(const pieces *p, const states *s, const number *q, int64_t stride, float scale,
            number *out, number *shares, int64_t threads, number *room) {
    int64_t each = p->W * p->F, heads = p->G * p->F, size = attend_room(p);
#pragma omp parallel num_threads(threads) if (p->G * p->R * each * p->C > SMALL)
    {
        number *keys = room + omp_get_thread_num() * size, *values = keys + p->C * p->D;
        float *x = (float *)(values + p->C * p->D);
        int64_t laid = -1;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < p->G * p->R; task++) {
            int64_t g = task / p->R, r = task % p->R;
            lay_down(p, s, r, g, laid == g ? p->S : 0, keys);
            lay_across(p, s, r, p->G + g, laid == g ? p->S / 2 * 2 : 0, values);
            laid = g;
            for (int64_t start = 0; start < each; start += ROWS) {
                const number *a[ROWS];
                floats sums[ROWS][2];
                int64_t count = each - start < ROWS ? each - start : ROWS;
                int64_t end = end_of(p, r, start);
                for (int64_t k = 0; k < ROWS; k++) {
                    int64_t i = start + (k < count ? k : count - 1);
                    int64_t node = p->rows[r * p->W + i / p->F];
                    a[k] = q + node * stride + (g * p->F + i % p->F) * p->D;
                }
                for (int64_t c = 0; c < end; c += COLUMNS) {
                    multiply(a, PER, keys + PER * c, PER * p->C, p->D / PER, sums);
                    for (int64_t k = 0; k < ROWS; k++) memcpy(x + k * p->C + c, sums[k], 128);
                }
                for (int64_t k = 0; k < ROWS; k++) {
                    int64_t i = start + (k < count ? k : count - 1);
                    number *share = shares + (task * each + i) * p->C;
                    if (k < count)
                        softmax(x + k * p->C, p->bias + (r * p->W + i / p->F) * p->C, scale, end,
                                share);
                    a[k] = share;
                }
                for (int64_t d = 0; d < p->D; d += COLUMNS) {
                    multiply(a, PER, values + PER * d, PER * p->D, end / PER, sums);
                    for (int64_t k = 0; k < count; k++) {
                        int64_t i = start + k, node = owner(p, r, i);
                        if (node < 0) continue;
                        number *to = out + (node * heads + g * p->F + i % p->F) * p->D + d;
                        put(to, sums[k][0]);
                        put(to + LANES, sums[k][1]);
                    }
                }
            }
        }
    }
}

/* The same of `attend_backward`. */
int64_t attend_backward_room(const pieces *p) {
    int64_t each = (p->W * p->F + ROWS - 1) / ROWS * ROWS;
    return PER * (2 * p->G * p->S * p->D + ROWS * p->C) + 2 * p->C * p->D + ROWS * p->C +
           2 * each * (p->C + p->D) + p->D;
}

/* The gradients of queries, keys and values, (N, (F + 2) G D), and of keys and values before all,
   (2 G, P, D), from that of `out`. */
void attend_backward(const pieces *p, const states *s, const number *q, int64_t stride,
                     float scale, const number *grad, const number *shares, number *dnodes,
                     number *dbefore, int64_t threads, number *room) {
    int64_t G = p->G, F = p->F, D = p->D, C = p->C, S = p->S, W = p->W, P = p->P;
    int64_t each = W * F, full = (each + ROWS - 1) / ROWS * ROWS, wide_row = (F + 2) * G * D;
    int64_t size = attend_backward_room(p), above = 2 * G * S * D;
#pragma omp parallel num_threads(threads) if (G * p->R * each * C > SMALL)
    {
        number *own = room + omp_get_thread_num() * size;
        float *sum = (float *)own; /* (2 G, S, D): of keys and values above all rows */
        float *x = sum + above;
        number *values = own + PER * (above + ROWS * C), *keys = values + C * D, *ds = keys + C * D;
        number *ds_words = ds + ROWS * C, *share_words = ds_words + full * C;
        number *q_words = share_words + full * C, *g_words = q_words + full * D;
        number *zeros = g_words + full * D;
        memset(sum, 0, above * sizeof *sum);
        memset(zeros, 0, D * sizeof *zeros);
        int64_t laid = -1;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < G * p->R; task++) {
            int64_t g = task / p->R, r = task % p->R;
            lay_down(p, s, r, G + g, laid == g ? S : 0, values);
            lay_across(p, s, r, g, laid == g ? S / 2 * 2 : 0, keys);
            laid = g;
            for (int64_t start = 0; start < full; start += ROWS) {
                const number *a[ROWS], *query[ROWS], *share[ROWS];
                floats sums[ROWS][2];
                int64_t end = end_of(p, r, start);
                for (int64_t k = 0; k < ROWS; k++) {
                    int64_t i = start + k < each ? start + k : each - 1;
                    int64_t node = p->rows[r * W + i / F], head = g * F + i % F;
                    query[k] = q + node * stride + head * D;
                    share[k] = shares + (task * each + i) * C;
                    /* Places that no node fills, and what is computed beyond the last. */
                    int64_t gets = start + k < each && owner(p, r, i) >= 0;
                    a[k] = gets ? grad + (node * G * F + head) * D : zeros;
                }
                for (int64_t k = 0; k < ROWS; k += 2) {
                    side_by_side(query[k], query[k + 1], D, D, q_words + (start + k) * D);
                    side_by_side(a[k], a[k + 1], D, D, g_words + (start + k) * D);
                    columns_of(share[k], share[k + 1], end, C, share_words + (start + k) * C);
                }
                for (int64_t c = 0; c < end; c += COLUMNS) {
                    multiply(a, PER, values + PER * c, PER * C, D / PER, sums);
                    for (int64_t k = 0; k < ROWS; k++) memcpy(x + k * C + c, sums[k], 128);
                }
                for (int64_t k = 0; k < ROWS; k++)
                    softmax_backward(x + k * C, share[k], end, ds + k * C);
                for (int64_t k = 0; k < ROWS; k += 2)
                    columns_of(ds + k * C, ds + (k + 1) * C, end, C, ds_words + (start + k) * C);
                for (int64_t k = 0; k < ROWS; k++) a[k] = ds + k * C;
                for (int64_t d = 0; d < D; d += COLUMNS) {
                    multiply(a, PER, keys + PER * d, PER * D, end / PER, sums);
                    for (int64_t k = 0; k < ROWS && start + k < each; k++) {
                        int64_t i = start + k, node = owner(p, r, i);
                        if (node < 0) continue;
                        number *to = dnodes + node * wide_row + (g * F + i % F) * D + d;
                        put(to, sums[k][0] * scale);
                        put(to + LANES, sums[k][1] * scale);
                    }
                }
            }
            for (int64_t value = 0; value < 2; value++) {
                const number *from = value ? share_words : ds_words;
                const number *to = value ? g_words : q_words;
                float by = value ? 1.0f : scale;
                int64_t part = value * G + g;
                for (int64_t first = 0; first < S + W; first += ROWS) {
                    /* Within a row, nobody sees what stands behind. */
                    int64_t hidden = first < S ? 0 : (first - S) * F / 2 * 2;
                    for (int64_t d = 0; d < D; d += COLUMNS) {
                        const number *a[ROWS];
                        floats sums[ROWS][2];
                        for (int64_t k = 0; k < ROWS; k++)
                            a[k] = from + hidden * C + PER * (first + k);
                        multiply(a, PER * C, to + hidden * D + PER * d, PER * D,
                                 (full - hidden) / PER, sums);
                        for (int64_t k = 0; k < ROWS && first + k < S + W; k++) {
                            int64_t c = first + k;
                            floats one = sums[k][0] * by, two = sums[k][1] * by;
                            if (c < S) {
                                float *all = sum + (part * S + c) * D + d;
                                floats old[2];
                                memcpy(old, all, sizeof old);
                                old[0] += one, old[1] += two;
                                memcpy(all, old, sizeof old);
                                continue;
                            }
                            int64_t node = p->rows[r * W + c - S];
                            if (p->place[node] != r * W + c - S) continue;
                            number *out = dnodes + node * wide_row + (F * G + part) * D + d;
                            put(out, one);
                            put(out + LANES, two);
                        }
                    }
                }
            }
        }
        /* A node above all rows may fill a place, too; as a key it is nowhere but here. */
        int64_t team = omp_get_num_threads();
#pragma omp for schedule(static)
        for (int64_t at = 0; at < 2 * G * S; at++) {
            int64_t part = at / S, c = at % S;
            number *to = c < P ? dbefore + (part * P + c) * D
                                 : dnodes + p->trunk[c - P] * wide_row + (F * G + part) * D;
            for (int64_t d = 0; d < D; d += LANES) {
                floats all = {};
                for (int64_t thread = 0; thread < team; thread++) {
                    floats one;
                    memcpy(&one, (float *)(room + thread * size) + at * D + d, sizeof one);
                    all += one;
                }
                put(to + d, all);
            }
        }
    }
}
