/* What a layer does between its matrix products: a pass over memory each.

   Sums and products are taken in float32 and rounded once, at the end. All arrays are contiguous.
   Letters: n rows (nodes), e columns, h heads, d head dimension. */

#include "native.h"

/* Whether the processor's vectors hold as much as those of native.h. */
int64_t has_wide_vectors(void) {
#ifdef __AVX512F__
    return 1;
#else
    return 0;
#endif
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* y = w x / rms(x), and 1 / rms(x) of every row. */
void rms_norm(const number *restrict x, const number *restrict weight, float epsilon, int64_t n,
              int64_t e, number *restrict y, float *restrict scale) {
#pragma omp parallel for schedule(static) if (n * e > SMALL)
    for (int64_t i = 0; i < n; i++) {
        const number *row = x + i * e;
        number *out = y + i * e;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < e; j++) sum += wide(row[j]) * wide(row[j]);
        float r = 1.0f / sqrtf(sum / e + epsilon);
        scale[i] = r;
#pragma omp simd
        for (int64_t j = 0; j < e; j++) out[j] = narrow(wide(row[j]) * r * wide(weight[j]));
    }
}

/* dx = r (u - x r^2 mean(u x)) + added, of u = w dy and r = scale; `added` may be null. */
void rms_norm_backward(const number *restrict dy, const number *restrict x,
                       const number *restrict weight, const float *restrict scale,
                       const number *restrict added, int64_t n, int64_t e,
                       number *restrict dx) {
#pragma omp parallel for schedule(static) if (n * e > SMALL)
    for (int64_t i = 0; i < n; i++) {
        const number *g = dy + i * e, *row = x + i * e;
        number *out = dx + i * e;
        float sum = 0, r = scale[i];
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < e; j++) sum += wide(g[j]) * wide(weight[j]) * wide(row[j]);
        float share = sum * r * r / e;
        if (added) {
            const number *a = added + i * e;
#pragma omp simd
            for (int64_t j = 0; j < e; j++)
                out[j] = narrow(r * (wide(g[j]) * wide(weight[j]) - wide(row[j]) * share) +
                                wide(a[j]));
        } else {
#pragma omp simd
            for (int64_t j = 0; j < e; j++)
                out[j] = narrow(r * (wide(g[j]) * wide(weight[j]) - wide(row[j]) * share));
        }
    }
}

/* y = silu(gate) up, of rows that hold both, e columns each, one behind the other. */
void gated(const number *restrict opening, int64_t n, int64_t e, number *restrict y) {
#pragma omp parallel for schedule(static) if (n * e > SMALL)
    for (int64_t i = 0; i < n; i++) {
        const number *gate = opening + 2 * i * e, *up = gate + e;
        number *out = y + i * e;
#pragma omp simd
        for (int64_t j = 0; j < e; j++) {
            float x = wide(gate[j]);
            out[j] = narrow(x * sigmoid(x) * wide(up[j]));
        }
    }
}

/* The gradients of gate and up, in rows of the same form. */
void gated_backward(const number *restrict dy, const number *restrict opening, int64_t n,
                    int64_t e, number *restrict dopening) {
#pragma omp parallel for schedule(static) if (n * e > SMALL)
    for (int64_t i = 0; i < n; i++) {
        const number *gate = opening + 2 * i * e, *up = gate + e, *grad = dy + i * e;
        number *dgate = dopening + 2 * i * e, *dup = dgate + e;
#pragma omp simd
        for (int64_t j = 0; j < e; j++) {
            float x = wide(gate[j]), g = wide(grad[j]), s = sigmoid(x);
            dgate[j] = narrow(g * wide(up[j]) * s * (1.0f + x * (1.0f - s)));
            dup[j] = narrow(g * x * s);
        }
    }
}

/* Turn heads in place, halves against halves; by a `sign` of -1 back. Rows of x are `stride` apart. */
void rotate(number *restrict x, const number *restrict cos, const number *restrict sin,
            float sign, int64_t n, int64_t stride, int64_t h, int64_t d) {
    int64_t half = d / 2;
#pragma omp parallel for schedule(static) if (n * h * d > SMALL)
    for (int64_t i = 0; i < n; i++) {
        const number *c = cos + i * d, *s = sin + i * d;
        for (int64_t k = 0; k < h; k++) {
            number *head = x + i * stride + k * d;
#pragma omp simd
            for (int64_t j = 0; j < half; j++) {
                float a = wide(head[j]), b = wide(head[j + half]);
                head[j] = narrow(a * wide(c[j]) - sign * b * wide(s[j]));
                head[j + half] = narrow(b * wide(c[j + half]) + sign * a * wide(s[j + half]));
            }
        }
    }
}

/* log sum exp of rows of e numbers. */
void log_sum_exp(const number *restrict x, int64_t n, int64_t e, float *restrict y) {
#pragma omp parallel for schedule(static) if (n * e > SMALL)
    for (int64_t i = 0; i < n; i++) {
        const number *row = x + i * e;
        float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < e; j++) most = wide(row[j]) > most ? wide(row[j]) : most;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < e; j++) sum += exponential(wide(row[j]) - most);
        y[i] = most + logf(sum);
    }
}

/* dx = share softmax(x), of rows of e numbers whose log sum exp is `total`. */
void softmax_times(const number *restrict x, const float *restrict total,
                   const float *restrict share, int64_t n, int64_t e, number *restrict dx) {
#pragma omp parallel for schedule(static) if (n * e > SMALL)
    for (int64_t i = 0; i < n; i++) {
        const number *row = x + i * e;
        number *out = dx + i * e;
        float t = total[i], s = share[i];
#pragma omp simd
        for (int64_t j = 0; j < e; j++) out[j] = narrow(s * exponential(wide(row[j]) - t));
    }
}
