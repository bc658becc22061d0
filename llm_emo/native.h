/* Numbers, alone and in vectors: bfloat16 or, with -DFLOAT32, float32.

   Processors multiply bfloat16 in pairs: of two vectors of pairs, both products of each pair are
   added to one float32. A word holds a pair then, else a number; what is said of words holds for
   both. */

#ifndef LLM_EMO_NATIVE_H
#define LLM_EMO_NATIVE_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define SMALL 16384 /* numbers below which a second thread costs more than it saves */
#define LANES 16    /* numbers of a vector of float32, words of any */
#define COLUMNS 32  /* numbers computed at a time */

typedef float floats __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint64_t doubles __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

#ifdef FLOAT32
typedef float number;
#define PER 1 /* numbers of a word */

static inline float wide(number x) { return x; }

static inline number narrow(float x) { return x; }
#else
typedef uint16_t number;
#define PER 2

static inline float wide(number x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

/* To the nearest, ties to even. What is no number stays none: its lower bits are zero, whether it
   was read as bfloat16 or made by the processor. */
static inline number narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
#endif

/* exp(f) of a number or a vector, |f| <= log(2) / 2. */
#define TAYLOR(f)                                                                            \
    ((((((((f) * (1.0f / 5040) + 1.0f / 720) * (f) + 1.0f / 120) * (f) + 1.0f / 24) * (f) +  \
        1.0f / 6) * (f) + 0.5f) * (f) + 1.0f) * (f) + 1.0f)

/* exp(x) to 1e-7 of it, infinity above 87, 1e-38 below -87: 2^k exp(f), |f| <= log(2) / 2, by its
   Taylor series. Written out because compilers make no vectors of expf. */
static inline float exponential(float x) {
    float y = x < -87.0f ? -87.0f : x;
    y = y > 87.0f ? 87.0f : y;
    float k = rintf(y * 1.44269504f);
    float f = (y - k * 0.693359375f) + k * 2.12194440e-4f;
    uint32_t bits = (uint32_t)((int32_t)k + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x > 87.0f ? INFINITY : TAYLOR(f) * power;
}

/* The same of numbers that are not above 0, in vectors; 0 below -87. */
static inline floats exponentials(floats x) {
    words seen = ~(words)(x <= -87.0f); /* what is no number stays none */
    floats y = (floats)(seen & (words)x), shifted = y * 1.44269504f + 12582912.0f;
    floats k = shifted - 12582912.0f; /* to the nearest: 1.5 * 2^23 leaves no place for a half */
    floats f = (y - k * 0.693359375f) + k * 2.12194440e-4f;
    /* k times 2^23, added to the exponent. */
    return (floats)(seen & ((words)(TAYLOR(f)) + ((words)shifted << 23)));
}

/* sum + a b, of words. */
static inline floats dot(floats sum, words a, words b) {
#ifdef FLOAT32
    return sum + (floats)a * (floats)b;
#elif defined __AVX512BF16__
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    const uint32_t upper = 0xffff0000;
    return sum + (floats)(a << 16) * (floats)(b << 16) + (floats)(a & upper) * (floats)(b & upper);
#endif
}

static inline words read(const number *x) {
    words y;
    memcpy(&y, x, sizeof y);
    return y;
}

/* A word in every lane. */
static inline words everywhere(const number *word) {
    uint32_t bits;
    memcpy(&bits, word, sizeof bits);
    return bits - (words){};
}

/* Two words in every two lanes. */
static inline words in_turn(const number *two) {
    uint64_t bits;
    memcpy(&bits, two, sizeof bits);
    return (words)(bits - (doubles){});
}

static inline floats floats_of(const float *x) {
    floats y;
    memcpy(&y, x, sizeof y);
    return y;
}

#ifdef FLOAT32
static inline floats widened(const number *x) { return floats_of(x); }

static inline void put(number *y, floats x) { memcpy(y, &x, sizeof x); }
#else
/* LANES numbers, each in the lower half of a lane. */
static inline words apart(const number *x) {
    halves bits;
    memcpy(&bits, x, sizeof bits);
    return __builtin_convertvector(bits, words);
}

static inline floats widened(const number *x) { return (floats)(apart(x) << 16); }

static inline void put(number *y, floats x) {
    words bits = (words)x;
    halves rounded = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, halves);
    memcpy(y, &rounded, sizeof rounded);
}
#endif

/* The lanes that are `shift` away, round and round. */
static inline floats turned(floats x, int shift) {
    words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return __builtin_shuffle(x, lane + shift);
}

static inline floats larger(floats x, floats y) {
    words first = (words)(x > y);
    return (floats)((first & (words)x) | (~first & (words)y));
}

/* The same number in every lane: the sum of all, or the largest. */
static inline floats total(floats x) {
    for (int shift = LANES / 2; shift; shift /= 2) x += turned(x, shift);
    return x;
}

static inline floats largest(floats x) {
    for (int shift = LANES / 2; shift; shift /= 2) x = larger(x, turned(x, shift));
    return x;
}

#endif
