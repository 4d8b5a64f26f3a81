/* Antialiased resizing of uint8 RGB images with AVX-512, bit for bit as PyTorch does it: first across, rounded to uint8,
 * then down, both with int16 weights and int32 sums. resizing.py computes the weights and calls `resize_rgb`.
 *
 * Two taps of a sum are one `dpwssd` instruction for 16 values of a row. PyTorch's AVX2 kernel computes the values of
 * one pixel at a time.
 */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

/* The value of `resizing_interface`: changes with the arguments, so that a library of another version is not used. */
#define INTERFACE 1

/* How one direction is resized. The arrays belong to the caller. */
typedef struct {
    int32_t inputs;          /* pixels (or rows) before and */
    int32_t outputs;         /* after */
    int32_t pairs;           /* of taps, the same for all outputs; unneeded ones have weight 0 */
    int32_t precision;       /* weights are multiples of 2^-precision */
    int32_t windows;         /* across: of 64 bytes each, from which a block of 16 values is computed: 1 or 2 */
    const int32_t *first;    /* across: the first byte of each block; down: the first row of each output */
    const int32_t *weights;  /* two int16 each; across: (blocks, pairs, 16); down: (outputs, pairs) */
    const uint8_t *bytes;    /* across: (blocks, 64), the bytes of the windows that belong to the first pair */
} direction;

#if defined(__x86_64__)

#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")))
#define ROWS 4 /* that are resized across together, because they share indices and weights */

static const __mmask64 LOW_BYTES = 0x5555555555555555; /* of int16 */

/* The first `count` of 64 bytes. */
AVX512 static inline __mmask64 first_bytes(ptrdiff_t count) {
    return count >= 64 ? ~(__mmask64)0 : count <= 0 ? 0 : ((__mmask64)1 << count) - 1;
}

AVX512 static inline void store_block(uint8_t *target, __m512i sum, __m128i precision) {
    sum = _mm512_max_epi32(_mm512_sra_epi32(sum, precision), _mm512_setzero_si512());
    _mm_storeu_si128((__m128i *)target, _mm512_cvtusepi32_epi8(sum));
}

/* Resize ROWS rows across, into rows of `target_pitch` bytes. Bytes after the end of a row are not read. */
AVX512 static void resize_across(const uint8_t *const *rows, const direction *across, uint8_t *target, size_t target_pitch) {
    const int blocks = (3 * across->outputs + 15) / 16, pairs = across->pairs;
    const __m512i half = _mm512_set1_epi32((1 << across->precision) >> 1), pair = _mm512_set1_epi8(6);
    const __m128i precision = _mm_cvtsi32_si128(across->precision);
    const int32_t *weights = across->weights;
    for (int block = 0; block < blocks; block++) {
        __m512i bytes = _mm512_loadu_si512(across->bytes + 64 * block);
        __m512i sums[ROWS] = {half, half, half, half};
        ptrdiff_t from = across->first[block], left = 3 * (ptrdiff_t)across->inputs - from;
        if (across->windows == 1) { /* all pairs lie in one window */
            __m512i window[ROWS];
            for (int row = 0; row < ROWS; row++) window[row] = _mm512_maskz_loadu_epi8(first_bytes(left), rows[row] + from);
            for (int t = 0; t < pairs; t++, weights += 16) {
                __m512i weight = _mm512_loadu_si512(weights);
                for (int row = 0; row < ROWS; row++) {
                    __m512i values = _mm512_maskz_permutexvar_epi8(LOW_BYTES, bytes, window[row]);
                    sums[row] = _mm512_dpwssd_epi32(sums[row], values, weight);
                }
                bytes = _mm512_add_epi8(bytes, pair);
            }
        } else { /* the windows move with the pairs */
            for (int t = 0; t < pairs; t++, weights += 16, from += 6, left -= 6) {
                __m512i weight = _mm512_loadu_si512(weights);
                for (int row = 0; row < ROWS; row++) {
                    __m512i low = _mm512_maskz_loadu_epi8(first_bytes(left), rows[row] + from);
                    __m512i high = _mm512_maskz_loadu_epi8(first_bytes(left - 64), rows[row] + from + 64);
                    __m512i values = _mm512_maskz_permutex2var_epi8(LOW_BYTES, low, bytes, high);
                    sums[row] = _mm512_dpwssd_epi32(sums[row], values, weight);
                }
            }
        }
        for (int row = 0; row < ROWS; row++) store_block(target + row * target_pitch + 16 * block, sums[row], precision);
    }
}

/* One row of the result: sums over 2 * pairs rows, with one weight each. */
AVX512 static void resize_down(const uint8_t *const *rows, const int32_t *weights, const direction *down, uint8_t *target, int size) {
    const __m512i half = _mm512_set1_epi32((1 << down->precision) >> 1), zero = _mm512_setzero_si512();
    const __m128i precision = _mm_cvtsi32_si128(down->precision);
    for (int x = 0; x < size; x += 64) {
        __m512i s0 = half, s1 = half, s2 = half, s3 = half;
        for (int t = 0; t < down->pairs; t++) {
            __m512i above = _mm512_loadu_si512(rows[2 * t] + x), below = _mm512_loadu_si512(rows[2 * t + 1] + x);
            __m512i low = _mm512_unpacklo_epi8(above, below), high = _mm512_unpackhi_epi8(above, below);
            __m512i weight = _mm512_set1_epi32(weights[t]);
            s0 = _mm512_dpwssd_epi32(s0, _mm512_unpacklo_epi8(low, zero), weight);
            s1 = _mm512_dpwssd_epi32(s1, _mm512_unpackhi_epi8(low, zero), weight);
            s2 = _mm512_dpwssd_epi32(s2, _mm512_unpacklo_epi8(high, zero), weight);
            s3 = _mm512_dpwssd_epi32(s3, _mm512_unpackhi_epi8(high, zero), weight);
        }
        s0 = _mm512_packs_epi32(_mm512_sra_epi32(s0, precision), _mm512_sra_epi32(s1, precision));
        s2 = _mm512_packs_epi32(_mm512_sra_epi32(s2, precision), _mm512_sra_epi32(s3, precision));
        _mm512_mask_storeu_epi8(target + x, first_bytes(size - x), _mm512_packus_epi16(s0, s2));
    }
}

/* Resize an RGB image whose rows are `pitch` bytes apart. Nothing outside of the image is read.
 * Returns 0, or 1 where memory is missing. */
AVX512 int resize_rgb(const uint8_t *source, int64_t pitch, const direction *across, const direction *down, uint8_t *target) {
    const int taps = 2 * down->pairs, size = 3 * across->outputs, last = down->inputs - 1;
    const size_t row_size = ((size_t)size + 63) / 64 * 64;
    size_t kept = ROWS; /* rows resized across, in a ring */
    while (kept < (size_t)taps + ROWS) kept *= 2;
    uint8_t *ring = aligned_alloc(64, kept * row_size);
    const uint8_t **rows = malloc(sizeof(*rows) * taps);
    int done = 0;
    if (!ring || !rows) {
        free(ring);
        free(rows);
        return 1;
    }
    for (int y = 0; y < down->outputs; y++) {
        int first = down->first[y], end = first + taps <= last ? first + taps : last + 1;
        for (; done < end; done += ROWS) {
            const uint8_t *originals[ROWS];
            for (int row = 0; row < ROWS; row++) originals[row] = source + pitch * (done + row < last ? done + row : last);
            resize_across(originals, across, ring + done % kept * row_size, row_size);
        }
        for (int tap = 0; tap < taps; tap++) /* after the last row they have weight 0 */
            rows[tap] = ring + (first + tap) % kept * row_size;
        resize_down(rows, down->weights + (size_t)y * down->pairs, down, target + (size_t)y * size, size);
    }
    free(ring);
    free(rows);
    return 0;
}

/* INTERFACE where `resize_rgb` can be used, or else 0. */
int resizing_interface(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni")
               ? INTERFACE
               : 0;
}

#else

int resizing_interface(void) { return 0; }

#endif
