/* Sums of bytes times weights, for each instruction set (_resize.h). */

#include "_resize.h"

#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define X86
#endif

#define BLOCK 64 /* bytes of a row whose sums plain C keeps */

static inline Byte
clipped(uint32_t sum)
{
    int32_t value = (int32_t)sum >> BITS;
    return value < 0 ? 0 : value > 255 ? 255 : (Byte)value;
}

/* ---- plain C, which also does what the others leave ------------------------------------------ */

void
across_plain(Byte *out, const Byte *row, const Axis *axis, ptrdiff_t from)
{
    for (ptrdiff_t o = from; o < axis->count; o++) {
        uint32_t red = HALF, green = HALF, blue = HALF;
        const Byte *pixel = row + 3 * axis->first[o];
        for (ptrdiff_t t = 0; t < axis->taps[o]; t++, pixel += 3) {
            uint32_t weight = (uint32_t)axis->weights[t / GROUP * axis->count + o][t % GROUP];
            red += pixel[0] * weight;
            green += pixel[1] * weight;
            blue += pixel[2] * weight;
        }
        out[3 * o] = clipped(red);
        out[3 * o + 1] = clipped(green);
        out[3 * o + 2] = clipped(blue);
    }
}

void
down_plain(Byte *out, const Byte *const *rows, const Axis *axis, ptrdiff_t output,
           ptrdiff_t from, ptrdiff_t num_bytes)
{
    for (ptrdiff_t at = from; at < num_bytes; at += BLOCK) {
        ptrdiff_t size = num_bytes - at < BLOCK ? num_bytes - at : BLOCK;
        uint32_t sums[BLOCK];
        for (int i = 0; i < BLOCK; i++)
            sums[i] = HALF;
        for (ptrdiff_t t = 0; t < axis->taps[output]; t++) {
            uint32_t weight = (uint32_t)axis->weights[t / GROUP * axis->count + output][t % GROUP];
            const Byte *row = rows[t] + at;
            for (ptrdiff_t i = 0; i < size; i++)
                sums[i] += row[i] * weight;
        }
        for (ptrdiff_t i = 0; i < size; i++)
            out[at + i] = clipped(sums[i]);
    }
}

#ifdef X86

/* ---- AVX2: products of 16 bits ----------------------------------------------------------------

   weight = high * 2^15 + low, with 0 <= low < 2^15 and high in 16 bits, as weights are below 2^30.
   Two products of a byte and either add up to less than 2^31; what follows is exact modulo 2^32. */

static void
pack_16(const int32_t *weights, int32_t *packed)
{
    for (int pair = 0; pair < 2; pair++) {
        uint32_t one = (uint32_t)weights[2 * pair], two = (uint32_t)weights[2 * pair + 1];
        packed[pair] = (int32_t)((one & 0x7fff) | (two & 0x7fff) << 16);
        uint32_t high_one = (uint32_t)(weights[2 * pair] >> 15) & 0xffff;
        uint32_t high_two = (uint32_t)(weights[2 * pair + 1] >> 15);
        packed[2 + pair] = (int32_t)(high_one | high_two << 16);
    }
}

#define AVX2 __attribute__((target("avx2")))

/* _mm_storeu_si32 of gcc 11 and later. */
static inline void
store_four(Byte *out, __m128i bytes)
{
    int32_t four = _mm_cvtsi128_si32(bytes);
    memcpy(out, &four, sizeof four);
}

/* Two pixels at once, each in one half of a register, their colours side by side in 32 bits. */
AVX2 static ptrdiff_t
across_avx2(Byte *out, const Byte *row, const Axis *axis)
{
    const __m256i first_two = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
    const __m256i last_two = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
    ptrdiff_t o = 0;
    for (; o + 2 <= axis->num_safe; o += 2) {
        const Byte *left = row + 3 * axis->first[o], *right = row + 3 * axis->first[o + 1];
        const Weights *packed = axis->packed + o;
        __m256i low = _mm256_set1_epi32(HALF), high = _mm256_setzero_si256();
        for (ptrdiff_t g = 0; g < axis->groups; g++) {
            __m256i weights = _mm256_loadu_si256((const __m256i *)packed);
            __m256i pixels = _mm256_inserti128_si256(
                _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)left)),
                _mm_loadu_si128((const __m128i *)right), 1);
            __m256i one = _mm256_shuffle_epi8(pixels, first_two);
            __m256i two = _mm256_shuffle_epi8(pixels, last_two);
            __m256i low_one = _mm256_madd_epi16(one, _mm256_shuffle_epi32(weights, 0x00));
            __m256i low_two = _mm256_madd_epi16(two, _mm256_shuffle_epi32(weights, 0x55));
            __m256i high_one = _mm256_madd_epi16(one, _mm256_shuffle_epi32(weights, 0xaa));
            __m256i high_two = _mm256_madd_epi16(two, _mm256_shuffle_epi32(weights, 0xff));
            low = _mm256_add_epi32(low, _mm256_add_epi32(low_one, low_two));
            high = _mm256_add_epi32(high, _mm256_add_epi32(high_one, high_two));
            left += 3 * GROUP;
            right += 3 * GROUP;
            packed += axis->count;
        }
        __m256i sums = _mm256_srai_epi32(_mm256_add_epi32(low, _mm256_slli_epi32(high, 15)), BITS);
        __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(sums, sums), _mm256_setzero_si256());
        /* The fourth byte of each is overwritten by the next pixel, which there always is. */
        store_four(out + 3 * o, _mm256_castsi256_si128(bytes));
        store_four(out + 3 * o + 3, _mm256_extracti128_si256(bytes, 1));
    }
    return o;
}

/* Two rows' bytes side by side in 32 bits: four registers of eight for 32 bytes of a row. */
AVX2 static inline void
add_two_rows(__m256i *low, __m256i *high, const Byte *one, const Byte *two, const int32_t *packed)
{
    const __m256i zero = _mm256_setzero_si256();
    __m256i above = _mm256_loadu_si256((const __m256i *)one);
    __m256i below = _mm256_loadu_si256((const __m256i *)two);
    __m256i mixed[2] = {_mm256_unpacklo_epi8(above, below), _mm256_unpackhi_epi8(above, below)};
    __m256i low_weights = _mm256_set1_epi32(packed[0]);
    __m256i high_weights = _mm256_set1_epi32(packed[2]);
    for (int i = 0; i < 4; i++) {
        __m256i wide = i % 2 ? _mm256_unpackhi_epi8(mixed[i / 2], zero)
                             : _mm256_unpacklo_epi8(mixed[i / 2], zero);
        low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(wide, low_weights));
        high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(wide, high_weights));
    }
}

AVX2 static ptrdiff_t
down_avx2(Byte *out, const Byte *const *rows, const Axis *axis, ptrdiff_t output,
          ptrdiff_t num_bytes)
{
    ptrdiff_t at = 0;
    for (; at + 32 <= num_bytes; at += 32) {
        __m256i low[4], high[4];
        for (int i = 0; i < 4; i++) {
            low[i] = _mm256_set1_epi32(HALF);
            high[i] = _mm256_setzero_si256();
        }
        for (ptrdiff_t g = 0; g < axis->groups; g++) {
            const int32_t *packed = axis->packed[g * axis->count + output];
            const Byte *const *four = rows + GROUP * g;
            add_two_rows(low, high, four[0] + at, four[1] + at, packed);
            add_two_rows(low, high, four[2] + at, four[3] + at, packed + 1);
        }
        for (int i = 0; i < 4; i++)
            low[i] = _mm256_srai_epi32(
                _mm256_add_epi32(low[i], _mm256_slli_epi32(high[i], 15)), BITS);
        __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(low[0], low[1]),
                                            _mm256_packs_epi32(low[2], low[3]));
        _mm256_storeu_si256((__m256i *)(out + at), bytes);
    }
    return at;
}

/* ---- AVX-512 with VNNI: products of 8 bits ----------------------------------------------------

   weight = third * 2^16 + second * 2^8 + first, each in 8 bits with a sign: exact for weights below
   1.99, and none is above 1.3 (lanczos, two pixels enlarged). Sums are exact modulo 2^32. */

static void
pack_8(const int32_t *weights, int32_t *packed)
{
    int8_t digits[GROUP][GROUP] = {{0}};
    for (int tap = 0; tap < GROUP; tap++) {
        int32_t rest = weights[tap];
        for (int digit = 0; digit < 3; digit++) {
            digits[digit][tap] = (int8_t)(((rest + 128) & 255) - 128);
            rest = (rest - digits[digit][tap]) >> 8;
        }
    }
    memcpy(packed, digits, sizeof digits);
}

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

VNNI static inline __m512i
joined(const __m512i *sums)
{
    __m512i high = _mm512_add_epi32(_mm512_slli_epi32(sums[1], 8), _mm512_slli_epi32(sums[2], 16));
    return _mm512_srai_epi32(_mm512_add_epi32(sums[0], high), BITS);
}

/* Four pixels at once, each in a quarter of a register, four taps of a colour in 32 bits. */
VNNI static ptrdiff_t
across_vnni(Byte *out, const Byte *row, const Axis *axis)
{
    const __m512i by_colour = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1));
    const __m128i dense = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    ptrdiff_t o = 0;
    for (; o + 4 <= axis->num_safe; o += 4) {
        const ptrdiff_t *first = axis->first + o;
        const Weights *packed = axis->packed + o;
        __m512i sums[3] = {_mm512_set1_epi32(HALF), _mm512_setzero_si512(), _mm512_setzero_si512()};
        for (ptrdiff_t g = 0; g < axis->groups; g++) {
            const Byte *from = row + 3 * GROUP * g;
            __m512i pixels = _mm512_castsi128_si512(
                _mm_loadu_si128((const __m128i *)(from + 3 * first[0])));
            pixels = _mm512_inserti32x4(
                pixels, _mm_loadu_si128((const __m128i *)(from + 3 * first[1])), 1);
            pixels = _mm512_inserti32x4(
                pixels, _mm_loadu_si128((const __m128i *)(from + 3 * first[2])), 2);
            pixels = _mm512_inserti32x4(
                pixels, _mm_loadu_si128((const __m128i *)(from + 3 * first[3])), 3);
            pixels = _mm512_shuffle_epi8(pixels, by_colour);
            __m512i weights = _mm512_loadu_si512(packed + g * axis->count);
            sums[0] = _mm512_dpbusd_epi32(sums[0], pixels, _mm512_shuffle_epi32(weights, 0x00));
            sums[1] = _mm512_dpbusd_epi32(sums[1], pixels, _mm512_shuffle_epi32(weights, 0x55));
            sums[2] = _mm512_dpbusd_epi32(sums[2], pixels, _mm512_shuffle_epi32(weights, 0xaa));
        }
        __m512i values = _mm512_max_epi32(joined(sums), _mm512_setzero_si512());
        __m128i bytes = _mm_shuffle_epi8(_mm512_cvtusepi32_epi8(values), dense);
        _mm_mask_storeu_epi8(out + 3 * o, 0x0fff, bytes);
    }
    return o;
}

VNNI static ptrdiff_t
down_vnni(Byte *out, const Byte *const *rows, const Axis *axis, ptrdiff_t output,
          ptrdiff_t num_bytes)
{
    for (ptrdiff_t at = 0; at < num_bytes; at += 64) {
        ptrdiff_t size = num_bytes - at < 64 ? num_bytes - at : 64;
        __mmask64 inside = ~(__mmask64)0 >> (64 - size);
        __m512i sums[4][3];
        for (int i = 0; i < 4; i++) {
            sums[i][0] = _mm512_set1_epi32(HALF);
            sums[i][1] = sums[i][2] = _mm512_setzero_si512();
        }
        for (ptrdiff_t g = 0; g < axis->groups; g++) {
            const Byte *const *taken = rows + GROUP * g;
            const int32_t *packed = axis->packed[g * axis->count + output];
            __m512i one = _mm512_maskz_loadu_epi8(inside, taken[0] + at);
            __m512i two = _mm512_maskz_loadu_epi8(inside, taken[1] + at);
            __m512i three = _mm512_maskz_loadu_epi8(inside, taken[2] + at);
            __m512i four = _mm512_maskz_loadu_epi8(inside, taken[3] + at);
            __m512i upper[2] = {_mm512_unpacklo_epi8(one, two), _mm512_unpackhi_epi8(one, two)};
            __m512i lower[2] = {_mm512_unpacklo_epi8(three, four),
                                _mm512_unpackhi_epi8(three, four)};
            for (int i = 0; i < 4; i++) {
                __m512i taps = i % 2 ? _mm512_unpackhi_epi16(upper[i / 2], lower[i / 2])
                                     : _mm512_unpacklo_epi16(upper[i / 2], lower[i / 2]);
                for (int digit = 0; digit < 3; digit++)
                    sums[i][digit] = _mm512_dpbusd_epi32(
                        sums[i][digit], taps, _mm512_set1_epi32(packed[digit]));
            }
        }
        __m512i bytes = _mm512_packus_epi16(
            _mm512_packs_epi32(joined(sums[0]), joined(sums[1])),
            _mm512_packs_epi32(joined(sums[2]), joined(sums[3])));
        _mm512_mask_storeu_epi8(out + at, inside, bytes);
    }
    return num_bytes;
}

static int
has_vnni(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

#endif

int
find_kernels(Kernel kernels[MAX_KERNELS])
{
    int number = 0;
#ifdef X86
    if (has_vnni())
        kernels[number++] = (Kernel){"avx512", pack_8, across_vnni, down_vnni};
    if (__builtin_cpu_supports("avx2"))
        kernels[number++] = (Kernel){"avx2", pack_16, across_avx2, down_avx2};
#endif
    kernels[number++] = (Kernel){"plain", NULL, NULL, NULL};
    return number;
}
