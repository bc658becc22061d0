/* LoRA's products, of a few columns or a few rows each, which libraries run far below a machine's
   rate.

   What a loop reads again and again is laid out in words first. A and B, float32, are rounded once,
   B with the scale of the updates; sums, and what is learned, are float32.

   Letters: n nodes, e inputs, r the sum of the adapters' ranks. Ranks are multiples of BLOCK, inputs
   and the outputs of each projection, its `size`, of COLUMNS. Rows are contiguous. */

#include "native.h"

#define BLOCK 8 /* ranks computed at a time */
#define ROWS 8  /* nodes computed at a time */
#define TWO (2 * PER) /* numbers of two words */

/* W of BLOCK rows, at the two words of columns from TWO c on: those of each row, row by row. Row k
   and column j of W are w[k * down + j * right]. */
static void lay_by_columns(const float *w, int64_t down, int64_t right, float scale, int64_t c,
                           number *out) {
    for (int64_t k = 0; k < BLOCK; k++)
        for (int64_t j = 0; j < TWO; j++)
            out[(c * BLOCK + k) * TWO + j] = narrow(scale * w[k * down + (TWO * c + j) * right]);
}

/* The same columns of W of `rank` rows and `width` columns: words of PER rows, column by column. */
static void lay_by_rows(const float *w, int64_t down, int64_t right, float scale, int64_t rank,
                        int64_t width, int64_t c, number *out) {
    for (int64_t k = 0; k < rank; k++)
        for (int64_t j = TWO * c; j < TWO * c + TWO; j++)
            out[(k / PER * width + j) * PER + k % PER] = narrow(scale * w[k * down + j * right]);
}

/* low = x W^T of `rows` rows, at most ROWS, of x, `stride` apart, for W as `lay_by_columns` lays it,
   block by block; rows of low are r apart. */
static void project_rows(const number *restrict x, int64_t rows, int64_t stride, int64_t width,
                         const number *restrict w, int64_t rank, int64_t r, number *restrict low) {
    for (int64_t start = 0; start < rank; start += BLOCK, w += width * BLOCK) {
        floats sums[ROWS] = {};
        if (rows == ROWS)
            for (int64_t c = 0; c < width / TWO; c++) {
                words numbers = read(w + c * BLOCK * TWO);
#pragma GCC unroll 8
                for (int64_t i = 0; i < ROWS; i++)
                    sums[i] = dot(sums[i], in_turn(x + i * stride + TWO * c), numbers);
            }
        else
            for (int64_t i = 0; i < rows; i++)
                for (int64_t c = 0; c < width / TWO; c++)
                    sums[i] = dot(sums[i], in_turn(x + i * stride + TWO * c),
                                  read(w + c * BLOCK * TWO));
        for (int64_t i = 0; i < rows; i++)
            for (int64_t k = 0; k < BLOCK; k++)
                low[i * r + start + k] = narrow(sums[i][2 * k] + sums[i][2 * k + 1]);
    }
}

/* y += low W of `rows` rows of y, `stride` apart, and of low, r apart, for W as `lay_by_rows` lays
   it. */
static void add_rows(const number *restrict low, int64_t rows, int64_t r, int64_t rank,
                     const number *restrict w, int64_t width, int64_t stride, number *restrict y) {
    for (int64_t j = 0; j < width; j += LANES)
        for (int64_t i = 0; i < rows; i++) {
            floats sum = widened(y + i * stride + j);
#pragma GCC unroll 4
            for (int64_t k = 0; k < rank / PER; k++)
                sum = dot(sum, everywhere(low + i * r + PER * k), read(w + (k * width + j) * PER));
            put(y + i * stride + j, sum);
        }
}

/* Of low, n rows of r numbers, those from PER c on: words of PER rows; behind the last row 0. */
static void lay_nodes(const number *low, int64_t n, int64_t r, int64_t c, number *out) {
    for (int64_t k = 0; k < r; k++)
        for (int64_t i = PER * c; i < PER * c + PER; i++)
            out[i / PER * r * PER + k * PER + i % PER] = i < n ? low[i * r + k] : 0;
}

/* W's gradient low^T x at COLUMNS columns, of `rank` columns of low as `lay_nodes` lays it, r a row.
   Row k and column j of it go to dw[k * down + j * right]. */
static void learn(const number *restrict low, int64_t r, int64_t rank, const number *restrict x,
                  int64_t stride, int64_t n, float scale, float *restrict dw, int64_t down,
                  int64_t right) {
    for (int64_t start = 0; start < rank; start += BLOCK) {
        floats first[BLOCK] = {}, second[BLOCK] = {};
        for (int64_t c = 0; c < (n + PER - 1) / PER; c++) {
            words one, two;
#ifdef FLOAT32
            one = read(x + c * stride), two = read(x + c * stride + LANES);
#else
            /* Of two rows, the even columns and the odd ones. */
            const uint32_t upper = 0xffff0000;
            words above = read(x + 2 * c * stride), below = {};
            if (2 * c + 1 < n) below = read(x + (2 * c + 1) * stride);
            one = (above & ~upper) | (below << 16), two = (above >> 16) | (below & upper);
#endif
            const number *both = low + (c * r + start) * PER;
#pragma GCC unroll 8
            for (int64_t k = 0; k < BLOCK; k++) {
                first[k] = dot(first[k], everywhere(both + PER * k), one);
                second[k] = dot(second[k], everywhere(both + PER * k), two);
            }
        }
        for (int64_t k = 0; k < BLOCK; k++)
            for (int64_t j = 0; j < LANES; j++) {
                float *out = dw + (start + k) * down + PER * j * right;
                out[0] = scale * first[k][j];
                out[(PER == 2 ? 1 : LANES) * right] = scale * second[k][j];
            }
    }
}

/* low = x A^T of all adapters, side by side, and out += scale low B^T of each, in its projection's
   columns. Of the projections, which all read x, those without an adapter have rank 0.

   x (n, e); A (rank, e); B (size, rank); out (n, sum of sizes); low (n, r); room for
   r e + sum of rank size. */
void lora(const number *x, int64_t n, int64_t e, int64_t count, const int64_t *ranks,
          const int64_t *sizes, const float **a, const float **b, float scale, number *out,
          number *low, number *room) {
    int64_t r = 0, outputs = 0;
    for (int64_t p = 0; p < count; p++) r += ranks[p], outputs += sizes[p];
#pragma omp parallel if (n * e > SMALL)
    {
        number *laid = room;
        for (int64_t p = 0; p < count; laid += ranks[p] * e, p++)
#pragma omp for schedule(static) collapse(2) nowait
            for (int64_t start = 0; start < ranks[p]; start += BLOCK)
                for (int64_t c = 0; c < e / TWO; c++)
                    lay_by_columns(a[p] + start * e, e, 1, 1.0f, c, laid + start * e);
        for (int64_t p = 0; p < count; laid += ranks[p] * sizes[p], p++)
#pragma omp for schedule(static) nowait
            for (int64_t c = 0; c < sizes[p] / TWO; c++)
                lay_by_rows(b[p], 1, ranks[p], scale, ranks[p], sizes[p], c, laid);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i += ROWS) {
            int64_t rows = n - i < ROWS ? n - i : ROWS;
            project_rows(x + i * e, rows, e, e, room, r, r, low + i * r);
            const number *w = room + r * e;
            int64_t rank = 0, column = 0;
            for (int64_t p = 0; p < count; p++) {
                add_rows(low + i * r + rank, rows, r, ranks[p], w, sizes[p], outputs,
                         out + i * outputs + column);
                w += ranks[p] * sizes[p], rank += ranks[p], column += sizes[p];
            }
        }
    }
}

/* The gradients of A and B, and dx += dlow A with dlow = scale dout B; dx may be null.

   dout (n, sum of sizes), the other shapes as in `lora`; room for r e + sum of rank size and 3 (n + 1)
   r. */
void lora_backward(const number *dout, const number *x, const number *low, int64_t n,
                   int64_t e, int64_t count, const int64_t *ranks, const int64_t *sizes,
                   const float **a, const float **b, float scale, number *dx, float **da,
                   float **db, number *room) {
    int64_t r = 0, outputs = 0;
    for (int64_t p = 0; p < count; p++) r += ranks[p], outputs += sizes[p];
    int64_t laid_out = r * e;
    for (int64_t p = 0; p < count; p++) laid_out += ranks[p] * sizes[p];
    number *dlow = room + laid_out, *lows = dlow + (n + 1) * r, *dlows = lows + (n + 1) * r;
#pragma omp parallel if (n * e > SMALL)
    {
        number *laid = room;
        int64_t first = 0;
        for (int64_t p = 0; p < count; laid += ranks[p] * sizes[p], p++)
#pragma omp for schedule(static) collapse(2) nowait
            for (int64_t start = 0; start < ranks[p]; start += BLOCK)
                for (int64_t c = 0; c < sizes[p] / TWO; c++)
                    lay_by_columns(b[p] + start, 1, ranks[p], scale, c, laid + start * sizes[p]);
        number *down = laid;
        if (dx)
            for (int64_t p = 0; p < count; first += ranks[p], p++)
#pragma omp for schedule(static) nowait
                for (int64_t c = 0; c < e / TWO; c++)
                    lay_by_rows(a[p], e, 1, 1.0f, ranks[p], e, c, down + first * e);
#pragma omp for schedule(static) nowait
        for (int64_t c = 0; c < (n + PER - 1) / PER; c++) lay_nodes(low, n, r, c, lows);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i += ROWS) {
            int64_t rows = n - i < ROWS ? n - i : ROWS, rank = 0, column = 0;
            const number *w = room;
            for (int64_t p = 0; p < count; p++) {
                project_rows(dout + i * outputs + column, rows, outputs, sizes[p], w, ranks[p], r,
                             dlow + i * r + rank);
                w += ranks[p] * sizes[p], rank += ranks[p], column += sizes[p];
            }
            if (dx) add_rows(dlow + i * r, rows, r, r, down, e, e, dx + i * e);
            for (int64_t c = i / PER; c < (i + rows + PER - 1) / PER; c++)
                lay_nodes(dlow, n, r, c, dlows);
        }
        int64_t rank = 0, column = 0;
        for (int64_t p = 0; p < count; rank += ranks[p], column += sizes[p], p++) {
#pragma omp for schedule(static) nowait
            for (int64_t j = 0; j < e; j += COLUMNS)
                if (ranks[p])
                    learn(dlows + PER * rank, r, ranks[p], x + j, e, n, 1.0f, da[p] + j, e, 1);
#pragma omp for schedule(static) nowait
            for (int64_t j = 0; j < sizes[p]; j += COLUMNS)
                if (ranks[p])
                    learn(lows + PER * rank, r, ranks[p], dout + column + j, outputs, n, scale,
                          db[p] + j * ranks[p], 1, ranks[p]);
        }
    }
}
