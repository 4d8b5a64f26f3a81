/* Antialiased resizing of uint8 RGB images with AVX-512, bit for bit as PyTorch does it: first across, rounded to uint8,
 * then down, both with int16 weights and int32 sums. resizing.py computes the weights and calls `resize_rgb`.
 *
 * Across, 16 values (one channel of a pixel each) are computed together. The bytes that they need for a pair of taps lie in
 * a window of 128 bytes, from which one instruction selects them. PyTorch's AVX2 kernel computes one pixel at a time.
 */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Changes with what resizing.py passes, so that a library of another version is not used. */
#define INTERFACE 3

/* How one direction is resized. The arrays belong to the caller. */
typedef struct {
    int32_t inputs;          /* pixels, or rows, before */
    int32_t outputs;         /* and after */
    int32_t pairs;           /* of taps, the same for all outputs; unneeded ones have weight 0 */
    int32_t precision;       /* weights are multiples of 2^-precision */
    int32_t reach;           /* across: pairs that are taken from a window before it moves */
    const int32_t *first;    /* across: the first byte of each 16 values; down: the first row of each output */
    const int32_t *weights;  /* two int16 each; across: (16 values, pairs, value); down: (outputs, pairs) */
    const uint8_t *places;   /* across: four for each value; first and third: where the first pair is in the window */
} direction;

#if defined(__x86_64__)

#include <immintrin.h>

#define ROWS 4     /* that are resized across together, because they share places and weights */
#define WINDOW 128 /* bytes */

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")))

/* Resize ROWS rows across, into rows that are `pitch` bytes apart. */
AVX512 static void resize_across(const uint8_t *const *rows, const direction *across, uint8_t *target, size_t pitch) {
    const int blocks = (3 * across->outputs + 15) / 16, pairs = across->pairs;
    const __m512i half = _mm512_set1_epi32((1 << across->precision) >> 1), pair = _mm512_set1_epi8(6);
    const __m128i precision = _mm_cvtsi32_si128(across->precision);
    const __mmask64 low_bytes = 0x5555555555555555; /* of int16 */
    const int32_t *weights = across->weights;
    for (int block = 0; block < blocks; block++) {
        const uint8_t *places_in_window = across->places + 64 * block;
        __m512i low[ROWS], high[ROWS], sums[ROWS] = {half, half, half, half};
        for (int t = 0; t < pairs;) {
            __m512i places = _mm512_loadu_si512(places_in_window);
            ptrdiff_t from = across->first[block] + 6 * t;
            int end = t + across->reach < pairs ? t + across->reach : pairs;
            for (int row = 0; row < ROWS; row++) {
                low[row] = _mm512_loadu_si512(rows[row] + from);
                high[row] = _mm512_loadu_si512(rows[row] + from + 64);
            }
            for (; t < end; t++, weights += 16) {
                __m512i weight = _mm512_loadu_si512(weights);
                for (int row = 0; row < ROWS; row++) {
                    __m512i values = _mm512_maskz_permutex2var_epi8(low_bytes, low[row], places, high[row]);
                    sums[row] = _mm512_dpwssd_epi32(sums[row], values, weight);
                }
                places = _mm512_add_epi8(places, pair);
            }
        }
        for (int row = 0; row < ROWS; row++) {
            __m512i sum = _mm512_max_epi32(_mm512_sra_epi32(sums[row], precision), _mm512_setzero_si512());
            _mm_storeu_si128((__m128i *)(target + row * pitch + 16 * block), _mm512_cvtusepi32_epi8(sum));
        }
    }
}

/* One row of the result, from 2 * pairs rows with one weight each. */
AVX512 static void resize_down(const uint8_t *const *rows, const int32_t *weights, const direction *down, uint8_t *target,
                               int size) {
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
        __mmask64 inside = size - x >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << (size - x)) - 1;
        _mm512_mask_storeu_epi8(target + x, inside, _mm512_packus_epi16(s0, s2));
    }
}

/* Resize an RGB image whose rows are `pitch` bytes apart. Nothing outside of the image is read.
 * Returns 0, or 1 where memory is missing. */
int resize_rgb(const uint8_t *source, int64_t pitch, const direction *across, const direction *down, uint8_t *target) {
    const int taps = 2 * down->pairs, size = 3 * across->outputs, last = down->inputs - 1;
    const size_t row_size = ((size_t)size + 63) / 64 * 64, source_size = 3 * (size_t)across->inputs;
    const size_t read_size = source_size + 6 * (size_t)across->pairs + WINDOW; /* by `resize_across`, of each row */
    size_t kept = ROWS; /* rows resized across, in a ring */
    while (kept < (size_t)taps + ROWS) kept *= 2;
    uint8_t *ring = aligned_alloc(64, kept * row_size), *copies = malloc(ROWS * read_size);
    const uint8_t **rows = malloc(sizeof(*rows) * taps);
    int done = 0, failed = !ring || !copies || !rows;
    for (int y = 0; y < down->outputs && !failed; y++) {
        int first = down->first[y], end = first + taps <= last ? first + taps : last + 1;
        for (; done < end; done += ROWS) {
            const uint8_t *originals[ROWS];
            for (int row = 0; row < ROWS; row++) {
                int64_t offset = pitch * (done + row < last ? done + row : last);
                originals[row] = source + offset;
                if (offset + read_size > pitch * last + source_size) /* ends behind the image */
                    originals[row] = memcpy(copies + row * read_size, source + offset, source_size);
            }
            resize_across(originals, across, ring + done % kept * row_size, row_size);
        }
        for (int tap = 0; tap < taps; tap++) /* after the last row they have weight 0 */
            rows[tap] = ring + (first + tap) % kept * row_size;
        const int32_t *weights = down->weights + (size_t)y * down->pairs;
        resize_down(rows, weights, down, target + (size_t)y * size, size);
    }
    free(ring);
    free(copies);
    free(rows);
    return failed;
}

/* INTERFACE where this processor can execute `resize_rgb`, or else 0. */
int resizing_interface(void) {
    __builtin_cpu_init();
    int supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
                    __builtin_cpu_supports("avx512vnni");
    return supported ? INTERFACE : 0;
}

#else

int resizing_interface(void) { return 0; }

#endif
