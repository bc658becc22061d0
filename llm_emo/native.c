/* What a layer does between its matrix products, in bfloat16: a pass over memory each.

   Sums and products are taken in float32 and rounded once, at the end. All arrays are contiguous.
   Letters: n rows (nodes), e columns, h heads, d head dimension. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bfloat16;

#define SMALL 16384 /* numbers below which a second thread costs more than it saves */

static inline float wide(bfloat16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

/* To the nearest, ties to even. What is no number stays none: its lower bits are zero, whether it
   was read as bfloat16 or made by the processor. */
static inline bfloat16 narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

/* exp(x) to 1e-7 of it, infinity above 87, 1e-38 below -87: 2^k exp(f), |f| <= log(2) / 2, by its
   Taylor series. Written out because compilers make no vectors of expf. */
static inline float exponential(float x) {
    float y = x < -87.0f ? -87.0f : x;
    y = y > 87.0f ? 87.0f : y;
    float k = rintf(y * 1.44269504f);
    float f = (y - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * f + 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)k + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x > 87.0f ? INFINITY : p * power;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* y = w x / rms(x), and 1 / rms(x) of every row. */
void rms_norm(const bfloat16 *restrict x, const bfloat16 *restrict weight, float epsilon, int64_t n,
              int64_t e, bfloat16 *restrict y, float *restrict scale) {
#pragma omp parallel for schedule(static) if (n * e > SMALL)
    for (int64_t i = 0; i < n; i++) {
        const bfloat16 *row = x + i * e;
        bfloat16 *out = y + i * e;
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
void rms_norm_backward(const bfloat16 *restrict dy, const bfloat16 *restrict x,
                       const bfloat16 *restrict weight, const float *restrict scale,
                       const bfloat16 *restrict added, int64_t n, int64_t e,
                       bfloat16 *restrict dx) {
#pragma omp parallel for schedule(static) if (n * e > SMALL)
    for (int64_t i = 0; i < n; i++) {
        const bfloat16 *g = dy + i * e, *row = x + i * e;
        bfloat16 *out = dx + i * e;
        float sum = 0, r = scale[i];
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < e; j++) sum += wide(g[j]) * wide(weight[j]) * wide(row[j]);
        float share = sum * r * r / e;
        if (added) {
            const bfloat16 *a = added + i * e;
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
void gated(const bfloat16 *restrict opening, int64_t n, int64_t e, bfloat16 *restrict y) {
#pragma omp parallel for schedule(static) if (n * e > SMALL)
    for (int64_t i = 0; i < n; i++) {
        const bfloat16 *gate = opening + 2 * i * e, *up = gate + e;
        bfloat16 *out = y + i * e;
#pragma omp simd
        for (int64_t j = 0; j < e; j++) {
            float x = wide(gate[j]);
            out[j] = narrow(x * sigmoid(x) * wide(up[j]));
        }
    }
}

/* The gradients of gate and up, in rows of the same form. */
void gated_backward(const bfloat16 *restrict dy, const bfloat16 *restrict opening, int64_t n,
                    int64_t e, bfloat16 *restrict dopening) {
#pragma omp parallel for schedule(static) if (n * e > SMALL)
    for (int64_t i = 0; i < n; i++) {
        const bfloat16 *gate = opening + 2 * i * e, *up = gate + e, *grad = dy + i * e;
        bfloat16 *dgate = dopening + 2 * i * e, *dup = dgate + e;
#pragma omp simd
        for (int64_t j = 0; j < e; j++) {
            float x = wide(gate[j]), g = wide(grad[j]), s = sigmoid(x);
            dgate[j] = narrow(g * wide(up[j]) * s * (1.0f + x * (1.0f - s)));
            dup[j] = narrow(g * x * s);
        }
    }
}

/* Turn heads in place, halves against halves; by a `sign` of -1 back. Rows of x are `stride` apart. */
void rotate(bfloat16 *restrict x, const bfloat16 *restrict cos, const bfloat16 *restrict sin,
            float sign, int64_t n, int64_t stride, int64_t h, int64_t d) {
    int64_t half = d / 2;
#pragma omp parallel for schedule(static) if (n * h * d > SMALL)
    for (int64_t i = 0; i < n; i++) {
        const bfloat16 *c = cos + i * d, *s = sin + i * d;
        for (int64_t k = 0; k < h; k++) {
            bfloat16 *head = x + i * stride + k * d;
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
void log_sum_exp(const bfloat16 *restrict x, int64_t n, int64_t e, float *restrict y) {
#pragma omp parallel for schedule(static) if (n * e > SMALL)
    for (int64_t i = 0; i < n; i++) {
        const bfloat16 *row = x + i * e;
        float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < e; j++) most = wide(row[j]) > most ? wide(row[j]) : most;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < e; j++) sum += exponential(wide(row[j]) - most);
        y[i] = most + logf(sum);
    }
}

/* dx = share softmax(x), of rows of e numbers whose log sum exp is `total`. */
void softmax_times(const bfloat16 *restrict x, const float *restrict total,
                   const float *restrict share, int64_t n, int64_t e, bfloat16 *restrict dx) {
#pragma omp parallel for schedule(static) if (n * e > SMALL)
    for (int64_t i = 0; i < n; i++) {
        const bfloat16 *row = x + i * e;
        bfloat16 *out = dx + i * e;
        float t = total[i], s = share[i];
#pragma omp simd
        for (int64_t j = 0; j < e; j++) out[j] = narrow(s * exponential(wide(row[j]) - t));
    }
}
