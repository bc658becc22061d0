/* Attention over a trie in pieces (branches.py), with float32's sums.

   One row of queries at a time, for the heads that share a key-value head: its scores, their softmax
   and the values, while all of it is in a core's cache. Queries, keys and values are read where they
   stand, node by node; keys and values of a row's columns are laid out in words first, but those of
   which a thread's row before had the same.

   Letters as there: N nodes, R rows, W nodes of the widest, A nodes of the longest path, P columns
   before all, T nodes on paths, C columns of the row that has most, filled up, G key-value heads, F
   heads of each, D head dimension, a multiple of COLUMNS. Of a row's queries, i = w F + f; of its
   columns the first P are before all, then come its path and its nodes, filled up to a multiple of
   COLUMNS. */

#include <omp.h>

#include "native.h"

#define ROWS 8 /* numbers broadcast at a time */

/* The pieces, and the sizes of a pass. */
typedef struct {
    const int64_t *starts;  /* (R + 1), each row's first node, and N */
    const int64_t *lengths; /* (R), of their paths */
    const int64_t *paths;   /* (R, A), nodes */
    const int64_t *scores;  /* (R + 1), how many a head has in the rows before */
    const int64_t *inner;   /* (T), the nodes on paths */
    const int64_t *slots;   /* (N), where a node is among them, or -1 */
    const number *bias;     /* of each row's nodes and columns, added to scores */
    int64_t R, W, P, A, T, C, G, F, D;
} pieces;

/* Columns above the nodes of row r. */
static inline int64_t above(const pieces *p, int64_t r) { return p->P + p->lengths[r]; }

/* Nodes of row r. */
static inline int64_t nodes_of(const pieces *p, int64_t r) {
    return p->starts[r + 1] - p->starts[r];
}

/* A number of columns, filled up. */
static inline int64_t filled(int64_t columns) {
    return (columns + COLUMNS - 1) / COLUMNS * COLUMNS;
}

/* The node behind column c of row r, of those that are not before all. */
static inline int64_t node_of(const pieces *p, int64_t r, int64_t c) {
    int64_t at = c - above(p, r);
    if (at < 0) return p->paths[r * p->A + c - p->P];
    return p->starts[r] + (at < nodes_of(p, r) ? at : 0); /* filling: any */
}

/* How many columns row r begins with that another begins with, too. */
static int64_t common(const pieces *p, int64_t r, int64_t other) {
    int64_t most = above(p, other) + nodes_of(p, other), c = p->P;
    if (above(p, r) < most) most = above(p, r);
    while (c < most && node_of(p, r, c) == node_of(p, other, c)) c++;
    return c;
}

/* The tasks of a thread, of G R: about as many scores as others have. Which they are, and with that
   the order of sums, depends on nothing else. */
static void share_of(const pieces *p, int64_t thread, int64_t team, int64_t *from, int64_t *to) {
    int64_t all = p->scores[p->R];
    *from = *to = p->G * p->R;
    for (int64_t task = p->G * p->R - 1; task >= 0; task--) {
        int64_t before = team * (task / p->R * all + p->scores[task % p->R]);
        if (before >= thread * p->G * all) *from = task;
        if (before >= (thread + 1) * p->G * all) *to = task;
    }
}

/* Whether some of these tasks are of key-value head g. */
static inline int has(const pieces *p, int64_t g, int64_t from, int64_t to) {
    return from < to && from < (g + 1) * p->R && to > g * p->R;
}

/* Keys and values: (N, 2 G D), rows `stride` apart, and those before all, (2 G, P, D). */
typedef struct {
    const number *both, *before;
    int64_t stride;
} states;

/* The key (part g) or value (part G + g) behind column c of row r. */
static inline const number *behind(const pieces *p, const states *s, int64_t r, int64_t part,
                                   int64_t c) {
    if (c < p->P) return s->before + (part * p->P + c) * p->D;
    return s->both + node_of(p, r, c) * s->stride + part * p->D;
}

/* Columns of row r from `first`: the words of a column one below another. */
static void lay_down(const pieces *p, const states *s, int64_t r, int64_t part, int64_t first,
                     number *out) {
    int64_t end = filled(above(p, r) + nodes_of(p, r));
    for (int64_t c = first; c < end; c++) {
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

/* The same, two by two, side by side. */
static void lay_across(const pieces *p, const states *s, int64_t r, int64_t part, int64_t first,
                       number *out) {
    int64_t end = filled(above(p, r) + nodes_of(p, r));
    for (int64_t c = first / 2 * 2; c < end; c += 2)
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

/* Numbers that are kept of a forward pass. */
int64_t attend_shares(const pieces *p) { return p->G * p->F * p->scores[p->R]; }

/* Numbers that a thread needs room for; a float takes PER. */
int64_t attend_room(const pieces *p) { return 2 * p->C * p->D + (PER + 1) * ROWS * p->C; }

/* out (N, G F D) of queries q (N, G F D), `stride` apart; shares, for each g and row (W F, C), of
   its own nodes and columns; where it is NULL nobody asks for them. */
void attend(const pieces *p, const states *s, const number *q, int64_t stride, float scale,
            number *out, number *shares, int64_t threads, number *room) {
    int64_t F = p->F, D = p->D, C = p->C, size = attend_room(p), all = p->scores[p->R];
#pragma omp parallel num_threads(threads) if (p->G * F * all > SMALL)
    {
        number *keys = room + omp_get_thread_num() * size, *values = keys + C * D;
        float *x = (float *)(values + C * D);
        number *passing = (number *)(x + ROWS * C);
        int64_t task, end_of_tasks, laid = -1;
        share_of(p, omp_get_thread_num(), omp_get_num_threads(), &task, &end_of_tasks);
        for (; task < end_of_tasks; task++) {
            int64_t g = task / p->R, r = task % p->R, start = p->starts[r], S = above(p, r);
            int64_t each = nodes_of(p, r) * F, columns = filled(S + nodes_of(p, r));
            int64_t same = r && laid == task - 1 ? common(p, r, r - 1) : 0;
            lay_down(p, s, r, g, same, keys);
            lay_across(p, s, r, p->G + g, same, values);
            laid = task;
            for (int64_t first = 0; first < each; first += ROWS) {
                const number *a[ROWS];
                floats sums[ROWS][2];
                int64_t count = each - first < ROWS ? each - first : ROWS;
                int64_t end = filled(S + (first + count - 1) / F + 1); /* nobody sees behind */
                for (int64_t k = 0; k < ROWS; k++) {
                    int64_t i = first + (k < count ? k : count - 1);
                    a[k] = q + (start + i / F) * stride + (g * F + i % F) * D;
                }
                for (int64_t c = 0; c < end; c += COLUMNS) {
                    multiply(a, PER, keys + PER * c, PER * C, D / PER, sums);
                    for (int64_t k = 0; k < ROWS; k++) memcpy(x + k * C + c, sums[k], 128);
                }
                number *share = passing;
                if (shares) share = shares + F * (g * all + p->scores[r]) + first * columns;
                for (int64_t k = 0; k < ROWS; k++) {
                    if (k < count) {
                        const number *bias = p->bias + p->scores[r] + (first + k) / F * columns;
                        softmax(x + k * C, bias, scale, end, share + k * columns);
                    }
                    a[k] = share + (k < count ? k : count - 1) * columns;
                }
                for (int64_t d = 0; d < D; d += COLUMNS) {
                    multiply(a, PER, values + PER * d, PER * D, end / PER, sums);
                    for (int64_t k = 0; k < count; k++) {
                        int64_t i = first + k;
                        number *to = out + ((start + i / F) * p->G * F + g * F + i % F) * D + d;
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
    int64_t full = (p->W * p->F + ROWS - 1) / ROWS * ROWS;
    return PER * (2 * p->G * (p->P + p->T) * p->D + ROWS * p->C) + 2 * p->C * p->D + ROWS * p->C +
           2 * full * (p->C + p->D) + p->D;
}

/* The gradients of queries, keys and values, (N, (F + 2) G D), and of keys and values before all,
   (2 G, P, D), from that of `out`. */
void attend_backward(const pieces *p, const states *s, const number *q, int64_t stride,
                     float scale, const number *grad, const number *shares, number *dnodes,
                     number *dbefore, int64_t threads, number *room) {
    int64_t G = p->G, F = p->F, D = p->D, C = p->C, P = p->P, wide_row = (F + 2) * G * D;
    int64_t most = (p->W * F + ROWS - 1) / ROWS * ROWS, all = p->scores[p->R];
    int64_t size = attend_backward_room(p), shared = P + p->T;
#pragma omp parallel num_threads(threads) if (G * F * all > SMALL)
    {
        number *own = room + omp_get_thread_num() * size;
        float *sum = (float *)own; /* (2 G, P + T, D): of columns that several rows have */
        float *x = sum + 2 * G * shared * D;
        number *values = (number *)(x + ROWS * C), *keys = values + C * D, *ds = keys + C * D;
        number *ds_words = ds + ROWS * C, *share_words = ds_words + most * C;
        number *q_words = share_words + most * C, *g_words = q_words + most * D;
        number *zeros = g_words + most * D;
        memset(zeros, 0, D * sizeof *zeros);
        int64_t task, end_of_tasks, laid = -1, team = omp_get_num_threads();
        share_of(p, omp_get_thread_num(), team, &task, &end_of_tasks);
        for (int64_t part = 0; part < 2 * G; part++)
            if (has(p, part % G, task, end_of_tasks))
                memset(sum + part * shared * D, 0, shared * D * sizeof *sum);
        for (; task < end_of_tasks; task++) {
            int64_t g = task / p->R, r = task % p->R, start = p->starts[r], S = above(p, r);
            int64_t W = nodes_of(p, r), each = W * F, full = (each + ROWS - 1) / ROWS * ROWS;
            int64_t columns = filled(S + W);
            int64_t same = r && laid == task - 1 ? common(p, r, r - 1) : 0;
            const number *given = shares + F * (g * all + p->scores[r]);
            lay_down(p, s, r, G + g, same, values);
            lay_across(p, s, r, g, same, keys);
            laid = task;
            for (int64_t first = 0; first < full; first += ROWS) {
                const number *a[ROWS], *query[ROWS], *share[ROWS];
                floats sums[ROWS][2];
                int64_t last = first + ROWS < each ? first + ROWS - 1 : each - 1;
                int64_t end = filled(S + last / F + 1);
                for (int64_t k = 0; k < ROWS; k++) {
                    int64_t i = first + k < each ? first + k : each - 1;
                    int64_t node = start + i / F, head = g * F + i % F;
                    query[k] = q + node * stride + head * D;
                    share[k] = given + i * columns;
                    /* What is computed beyond the last. */
                    a[k] = first + k < each ? grad + (node * G * F + head) * D : zeros;
                }
                for (int64_t k = 0; k < ROWS; k += 2) {
                    side_by_side(query[k], query[k + 1], D, D, q_words + (first + k) * D);
                    side_by_side(a[k], a[k + 1], D, D, g_words + (first + k) * D);
                    columns_of(share[k], share[k + 1], end, columns,
                               share_words + (first + k) * columns);
                }
                for (int64_t c = 0; c < end; c += COLUMNS) {
                    multiply(a, PER, values + PER * c, PER * C, D / PER, sums);
                    for (int64_t k = 0; k < ROWS; k++)
                        memcpy(x + k * columns + c, sums[k], 128);
                }
                for (int64_t k = 0; k < ROWS; k++)
                    softmax_backward(x + k * columns, share[k], end, ds + k * columns);
                for (int64_t k = 0; k < ROWS; k += 2)
                    columns_of(ds + k * columns, ds + (k + 1) * columns, end, columns,
                               ds_words + (first + k) * columns);
                for (int64_t k = 0; k < ROWS; k++) a[k] = ds + k * columns;
                for (int64_t d = 0; d < D; d += COLUMNS) {
                    multiply(a, PER, keys + PER * d, PER * D, end / PER, sums);
                    for (int64_t k = 0; k < ROWS && first + k < each; k++) {
                        int64_t i = first + k;
                        number *to = dnodes + (start + i / F) * wide_row + (g * F + i % F) * D + d;
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
                            a[k] = from + hidden * columns + PER * (first + k);
                        multiply(a, PER * columns, to + hidden * D + PER * d, PER * D,
                                 (full - hidden) / PER, sums);
                        for (int64_t k = 0; k < ROWS && first + k < S + W; k++) {
                            int64_t c = first + k, slot = c;
                            floats one = sums[k][0] * by, two = sums[k][1] * by;
                            if (c >= P) {
                                int64_t node = node_of(p, r, c);
                                slot = p->slots[node];
                                if (slot < 0) { /* on no path: a column of this row only */
                                    number *out = dnodes + node * wide_row + (F * G + part) * D + d;
                                    put(out, one);
                                    put(out + LANES, two);
                                    continue;
                                }
                                slot += P;
                            }
                            float *to_sum = sum + (part * shared + slot) * D + d;
                            floats old[2];
                            memcpy(old, to_sum, sizeof old);
                            old[0] += one, old[1] += two;
                            memcpy(to_sum, old, sizeof old);
                        }
                    }
                }
            }
        }
        int64_t from[team], to[team]; /* what threads had: others' sums of a part were not begun */
        for (int64_t thread = 0; thread < team; thread++)
            share_of(p, thread, team, from + thread, to + thread);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t at = 0; at < 2 * G * shared; at++) {
            int64_t part = at / shared, c = at % shared, g = part % G;
            number *out = c < P ? dbefore + (part * P + c) * D
                                : dnodes + p->inner[c - P] * wide_row + (F * G + part) * D;
            for (int64_t d = 0; d < D; d += LANES) {
                floats total_of_all = {};
                for (int64_t thread = 0; thread < team; thread++) {
                    floats one;
                    if (!has(p, g, from[thread], to[thread])) continue;
                    memcpy(&one, (float *)(room + thread * size) + at * D + d, sizeof one);
                    total_of_all += one;
                }
                put(out + d, total_of_all);
            }
        }
    }
}
