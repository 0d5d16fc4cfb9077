/* Resizing RGB as Pillow does, to the bit, but only what a window of the result needs.

   The arithmetic is that of Pillow's src/libImaging/Resample.c: weights are doubles that add up to
   one, rounded to fixed point of 22 bits; sums are 32 bits wide and wrap. Each output is a sum over
   some inputs of its row or column, its taps. Kernels take taps in groups of four.

   An instruction set is a `Kernel`: how it packs the weights of a group, and how it sums up. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define X86
#endif

#define BITS 22
#define HALF (1 << (BITS - 1))
#define GROUP 4
#define BLOCK 64
#define PI 3.14159265358979323846

typedef uint8_t Byte;
typedef int32_t Weights[GROUP];

/* What outputs of a window, in one direction, are made of. */
typedef struct {
    Py_ssize_t count;   /* outputs */
    Py_ssize_t groups;  /* of taps, of the output with the most */
    Py_ssize_t *first;  /* the first input of each output */
    Py_ssize_t *taps;   /* how many inputs each has */
    Weights *weights;   /* [group * count + output], zero beyond the taps */
    Weights *packed;    /* the same as the kernel wants it */
    Py_ssize_t num_safe; /* outputs for which a kernel may read 16 bytes for each group */
    int is_copy;        /* each output is one input, the next that of the next */
} Axis;

typedef struct {
    const char *name;
    void (*pack)(const int32_t *weights, int32_t *packed);
    /* Sums along a row, for as many outputs as suit it; how many. */
    Py_ssize_t (*across)(Byte *out, const Byte *row, const Axis *axis);
    /* Sums over rows, one for each tap, for as many bytes as suit it; how many. */
    Py_ssize_t (*down)(Byte *out, const Byte *const *rows, const Axis *axis, Py_ssize_t output,
                       Py_ssize_t num_bytes);
} Kernel;

static inline Byte
clipped(uint32_t sum)
{
    int32_t value = (int32_t)sum >> BITS;
    return value < 0 ? 0 : value > 255 ? 255 : (Byte)value;
}

/* ---- plain C, which also does what the others leave ------------------------------------------ */

static void
across_plain(Byte *out, const Byte *row, const Axis *axis, Py_ssize_t from)
{
    for (Py_ssize_t o = from; o < axis->count; o++) {
        uint32_t red = HALF, green = HALF, blue = HALF;
        const Byte *pixel = row + 3 * axis->first[o];
        for (Py_ssize_t t = 0; t < axis->taps[o]; t++, pixel += 3) {
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

static void
down_plain(Byte *out, const Byte *const *rows, const Axis *axis, Py_ssize_t output,
           Py_ssize_t from, Py_ssize_t num_bytes)
{
    for (Py_ssize_t at = from; at < num_bytes; at += BLOCK) {
        Py_ssize_t size = num_bytes - at < BLOCK ? num_bytes - at : BLOCK;
        uint32_t sums[BLOCK];
        for (int i = 0; i < BLOCK; i++)
            sums[i] = HALF;
        for (Py_ssize_t t = 0; t < axis->taps[output]; t++) {
            uint32_t weight = (uint32_t)axis->weights[t / GROUP * axis->count + output][t % GROUP];
            const Byte *row = rows[t] + at;
            for (Py_ssize_t i = 0; i < size; i++)
                sums[i] += row[i] * weight;
        }
        for (Py_ssize_t i = 0; i < size; i++)
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

/* Two pixels at once, each in one half of a register, their colours side by side in 32 bits. */
AVX2 static Py_ssize_t
across_avx2(Byte *out, const Byte *row, const Axis *axis)
{
    const __m256i first_two = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
    const __m256i last_two = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
    Py_ssize_t o = 0;
    for (; o + 2 <= axis->num_safe; o += 2) {
        const Byte *left = row + 3 * axis->first[o], *right = row + 3 * axis->first[o + 1];
        const Weights *packed = axis->packed + o;
        __m256i low = _mm256_set1_epi32(HALF), high = _mm256_setzero_si256();
        for (Py_ssize_t g = 0; g < axis->groups; g++) {
            __m256i weights = _mm256_loadu_si256((const __m256i *)packed);
            __m256i pixels = _mm256_inserti128_si256(
                _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)left)),
                _mm_loadu_si128((const __m128i *)right), 1);
            __m256i one = _mm256_shuffle_epi8(pixels, first_two);
            __m256i two = _mm256_shuffle_epi8(pixels, last_two);
            low = _mm256_add_epi32(low, _mm256_madd_epi16(one, _mm256_shuffle_epi32(weights, 0x00)));
            low = _mm256_add_epi32(low, _mm256_madd_epi16(two, _mm256_shuffle_epi32(weights, 0x55)));
            high = _mm256_add_epi32(high, _mm256_madd_epi16(one, _mm256_shuffle_epi32(weights, 0xaa)));
            high = _mm256_add_epi32(high, _mm256_madd_epi16(two, _mm256_shuffle_epi32(weights, 0xff)));
            left += 3 * GROUP;
            right += 3 * GROUP;
            packed += axis->count;
        }
        __m256i sums = _mm256_srai_epi32(_mm256_add_epi32(low, _mm256_slli_epi32(high, 15)), BITS);
        __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(sums, sums), _mm256_setzero_si256());
        /* The fourth byte of each is overwritten by the next pixel, which there always is. */
        _mm_storeu_si32(out + 3 * o, _mm256_castsi256_si128(bytes));
        _mm_storeu_si32(out + 3 * o + 3, _mm256_extracti128_si256(bytes, 1));
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

AVX2 static Py_ssize_t
down_avx2(Byte *out, const Byte *const *rows, const Axis *axis, Py_ssize_t output,
          Py_ssize_t num_bytes)
{
    Py_ssize_t at = 0;
    for (; at + 32 <= num_bytes; at += 32) {
        __m256i low[4], high[4];
        for (int i = 0; i < 4; i++) {
            low[i] = _mm256_set1_epi32(HALF);
            high[i] = _mm256_setzero_si256();
        }
        for (Py_ssize_t g = 0; g < axis->groups; g++) {
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
VNNI static Py_ssize_t
across_vnni(Byte *out, const Byte *row, const Axis *axis)
{
    const __m512i by_colour = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1));
    const __m128i dense = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    Py_ssize_t o = 0;
    for (; o + 4 <= axis->num_safe; o += 4) {
        const Py_ssize_t *first = axis->first + o;
        const Weights *packed = axis->packed + o;
        __m512i sums[3] = {_mm512_set1_epi32(HALF), _mm512_setzero_si512(), _mm512_setzero_si512()};
        for (Py_ssize_t g = 0; g < axis->groups; g++) {
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

VNNI static Py_ssize_t
down_vnni(Byte *out, const Byte *const *rows, const Axis *axis, Py_ssize_t output,
          Py_ssize_t num_bytes)
{
    for (Py_ssize_t at = 0; at < num_bytes; at += 64) {
        Py_ssize_t size = num_bytes - at < 64 ? num_bytes - at : 64;
        __mmask64 inside = ~(__mmask64)0 >> (64 - size);
        __m512i sums[4][3];
        for (int i = 0; i < 4; i++) {
            sums[i][0] = _mm512_set1_epi32(HALF);
            sums[i][1] = sums[i][2] = _mm512_setzero_si512();
        }
        for (Py_ssize_t g = 0; g < axis->groups; g++) {
            const Byte *const *four = rows + GROUP * g;
            const int32_t *packed = axis->packed[g * axis->count + output];
            __m512i one = _mm512_maskz_loadu_epi8(inside, four[0] + at);
            __m512i two = _mm512_maskz_loadu_epi8(inside, four[1] + at);
            __m512i three = _mm512_maskz_loadu_epi8(inside, four[2] + at);
            __m512i last = _mm512_maskz_loadu_epi8(inside, four[3] + at);
            __m512i upper[2] = {_mm512_unpacklo_epi8(one, two), _mm512_unpackhi_epi8(one, two)};
            __m512i lower[2] = {_mm512_unpacklo_epi8(three, last), _mm512_unpackhi_epi8(three, last)};
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

/* The kernels that this CPU has, the fastest first. */
static Kernel kernels[3];
static int num_kernels;

static void
find_kernels(void)
{
    num_kernels = 0;
#ifdef X86
    if (has_vnni())
        kernels[num_kernels++] = (Kernel){"avx512", pack_8, across_vnni, down_vnni};
    if (__builtin_cpu_supports("avx2"))
        kernels[num_kernels++] = (Kernel){"avx2", pack_16, across_avx2, down_avx2};
#endif
    kernels[num_kernels++] = (Kernel){"plain", NULL, NULL, NULL};
}

/* ---- weights --------------------------------------------------------------------------------- */

typedef struct {
    const char *name;
    double radius;
    double (*at)(double);  /* NULL: nearest, which has no weights */
} Filter;

static double
bilinear(double x)
{
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

/* Keys' cubic convolution with a = -0.5. The order of operations is Pillow's. */
static double
bicubic(double x)
{
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0)
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * a : 0.0;
}

static double
sinc(double x)
{
    if (x == 0.0)
        return 1.0;
    x *= PI;
    return sin(x) / x;
}

static double
lanczos(double x)
{
    return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0;
}

static const Filter filters[] = {
    {"nearest", 0.0, NULL},
    {"bilinear", 1.0, bilinear},
    {"bicubic", 2.0, bicubic},
    {"lanczos", 3.0, lanczos},
};

/* One direction of what is asked for: inputs `from` to `to` become `resized` outputs, of which
   `count` are wanted, from `start` on. Single precision is Pillow's. */
typedef struct {
    Py_ssize_t length;
    float from, to;
    Py_ssize_t resized, start, count;
} Span;

static double
scale_of(const Span *span)
{
    return (double)(span->to - span->from) / (double)span->resized;
}

static void
free_axis(Axis *axis)
{
    free(axis->first);
    free(axis->taps);
    free(axis->weights);
    free(axis->packed);
}

static int
new_axis(Axis *axis, Py_ssize_t count)
{
    memset(axis, 0, sizeof *axis);
    axis->count = count;
    axis->first = calloc((size_t)count, sizeof *axis->first);
    axis->taps = calloc((size_t)count, sizeof *axis->taps);
    return axis->first && axis->taps ? 0 : -1;
}

/* Find the taps of each output; the most that one has. */
static Py_ssize_t
find_taps(Axis *axis, const Span *span, double reach)
{
    double scale = scale_of(span);
    Py_ssize_t most = 0;
    for (Py_ssize_t o = 0; o < axis->count; o++) {
        double centre = span->from + ((double)(span->start + o) + 0.5) * scale;
        Py_ssize_t low = (Py_ssize_t)(centre - reach + 0.5);
        Py_ssize_t end = (Py_ssize_t)(centre + reach + 0.5);
        axis->first[o] = low < 0 ? 0 : low;
        axis->taps[o] = (end > span->length ? span->length : end) - axis->first[o];
        most = axis->taps[o] > most ? axis->taps[o] : most;
    }
    return most;
}

static int
find_weights(Axis *axis, const Span *span, const Filter *filter, const Kernel *kernel)
{
    double scale = scale_of(span), stretch = scale < 1.0 ? 1.0 : scale, shrink = 1.0 / stretch;
    axis->is_copy = scale == 1.0 && span->from == floorf(span->from);
    /* A copy has one tap each; every filter is one at zero. */
    Py_ssize_t most = find_taps(axis, span, axis->is_copy ? 0.5 : filter->radius * stretch);
    axis->groups = (most + GROUP - 1) / GROUP;
    size_t size = (size_t)axis->groups * (size_t)axis->count;
    double *exact = calloc((size_t)most, sizeof *exact);
    axis->weights = calloc(size, sizeof *axis->weights);
    axis->packed = kernel->pack ? calloc(size, sizeof *axis->packed) : NULL;
    int failed = !exact || !axis->weights || (kernel->pack && !axis->packed);
    for (Py_ssize_t o = 0; o < axis->count && !failed; o++) {
        double centre = span->from + ((double)(span->start + o) + 0.5) * scale, total = 0.0;
        for (Py_ssize_t t = 0; t < axis->taps[o]; t++) {
            exact[t] = filter->at(((double)(t + axis->first[o]) - centre + 0.5) * shrink);
            total += exact[t];
        }
        for (Py_ssize_t t = 0; t < axis->taps[o]; t++) {
            double weight = (total != 0.0 ? exact[t] / total : exact[t]) * (1 << BITS);
            axis->weights[t / GROUP * axis->count + o][t % GROUP] =
                (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
    }
    for (size_t i = 0; i < size && kernel->pack && !failed; i++)
        kernel->pack(axis->weights[i], axis->packed[i]);
    free(exact);
    return failed ? -1 : 0;
}

/* Count the outputs whose groups lie within a row. The last one is never among them: kernels may
   write a byte beyond what they compute. */
static void
find_safe(Axis *axis, Py_ssize_t row_bytes)
{
    Py_ssize_t room = row_bytes - (3 * GROUP * (axis->groups - 1) + 16);
    while (axis->num_safe < axis->count - 1 && 3 * axis->first[axis->num_safe] <= room)
        axis->num_safe++;
}

/* Inputs nearest to the outputs. The steps are added up, as Pillow does: their rounding shows. */
static void
find_nearest(Axis *axis, const Span *span)
{
    double step = scale_of(span), position = span->from + step * 0.5;
    for (Py_ssize_t skipped = 0; skipped < span->start; skipped++)
        position += step;
    for (Py_ssize_t o = 0; o < axis->count; o++, position += step)
        axis->first[o] = (Py_ssize_t)position;
}

/* ---- resizing -------------------------------------------------------------------------------- */

typedef struct {
    const Byte *source;
    Py_ssize_t source_stride;
    Byte *out;
    Py_ssize_t out_stride;
    Span across, down;
    const Filter *filter;
    const Kernel *kernel;
    int tall_first; /* whether much of the height going, columns are summed up before rows */
} Task;

static void
sum_across(const Task *task, Byte *out, const Byte *row, const Axis *axis)
{
    if (axis->is_copy) {
        memcpy(out, row + 3 * axis->first[0], 3 * (size_t)axis->count);
        return;
    }
    Py_ssize_t done = task->kernel->across ? task->kernel->across(out, row, axis) : 0;
    across_plain(out, row, axis, done);
}

static void
sum_down(const Task *task, Byte *out, const Byte *const *rows, const Axis *axis, Py_ssize_t output,
         Py_ssize_t num_bytes)
{
    if (axis->is_copy) {
        memcpy(out, rows[0], (size_t)num_bytes);
        return;
    }
    Py_ssize_t done = 0;
    if (task->kernel->down)
        done = task->kernel->down(out, rows, axis, output, num_bytes);
    down_plain(out, rows, axis, output, done, num_bytes);
}

/* Rows first: each that is needed is resized once, and kept while columns need it. */
static int
rows_first(const Task *task, Axis *across, Axis *down)
{
    size_t num_kept = (size_t)(GROUP * down->groups), row_bytes = 3 * (size_t)across->count;
    Byte *kept = malloc(num_kept * row_bytes);
    const Byte **rows = malloc(num_kept * sizeof *rows);
    if (!kept || !rows) {
        free(kept);
        free(rows);
        return -1;
    }
    find_safe(across, 3 * task->across.length);
    Py_ssize_t next = 0;
    for (Py_ssize_t o = 0; o < down->count; o++) {
        Py_ssize_t first = down->first[o], end = first + down->taps[o];
        for (next = next < first ? first : next; next < end; next++)
            sum_across(task, kept + (size_t)next % num_kept * row_bytes,
                       task->source + next * task->source_stride, across);
        for (size_t t = 0; t < num_kept; t++) {
            Py_ssize_t row = first + (Py_ssize_t)t;
            rows[t] = kept + (size_t)(row < end ? row : end - 1) % num_kept * row_bytes;
        }
        sum_down(task, task->out + o * task->out_stride, rows, down, o, (Py_ssize_t)row_bytes);
    }
    free(kept);
    free(rows);
    return 0;
}

static int
columns_first(const Task *task, Axis *across, Axis *down)
{
    Py_ssize_t last = across->count - 1, left = across->first[0];
    Py_ssize_t num_bytes = 3 * (across->first[last] + across->taps[last] - left);
    Byte *row = malloc((size_t)num_bytes);
    const Byte **rows = malloc((size_t)(GROUP * down->groups) * sizeof *rows);
    if (!row || !rows) {
        free(row);
        free(rows);
        return -1;
    }
    for (Py_ssize_t o = 0; o < across->count; o++)
        across->first[o] -= left;
    find_safe(across, num_bytes);
    for (Py_ssize_t o = 0; o < down->count; o++) {
        for (Py_ssize_t t = 0; t < GROUP * down->groups; t++) {
            Py_ssize_t tap = t < down->taps[o] ? t : down->taps[o] - 1;
            rows[t] = task->source + (down->first[o] + tap) * task->source_stride + 3 * left;
        }
        sum_down(task, row, rows, down, o, num_bytes);
        sum_across(task, task->out + o * task->out_stride, row, across);
    }
    free(row);
    free(rows);
    return 0;
}

static int
is_tall(const Task *task)
{
    Py_ssize_t lost_rows = task->down.length - task->down.resized;
    return lost_rows > 0 && lost_rows > 2 * (task->across.length - task->across.resized);
}

static void
copy_nearest(const Task *task, const Axis *across, const Axis *down)
{
    for (Py_ssize_t y = 0; y < down->count; y++) {
        Byte *out = task->out + y * task->out_stride;
        const Byte *row = task->source + down->first[y] * task->source_stride;
        for (Py_ssize_t x = 0; x < across->count; x++, out += 3) {
            /* Steps that add up to more than there is leave black. */
            if (across->first[x] < task->across.length && down->first[y] < task->down.length)
                memcpy(out, row + 3 * across->first[x], 3);
            else
                memset(out, 0, 3);
        }
    }
}

static int
resize(const Task *task)
{
    Axis across = {0}, down = {0};
    int failed = new_axis(&across, task->across.count) || new_axis(&down, task->down.count);
    if (!failed && !task->filter->at) {
        find_nearest(&across, &task->across);
        find_nearest(&down, &task->down);
        copy_nearest(task, &across, &down);
    } else if (!failed) {
        failed = find_weights(&across, &task->across, task->filter, task->kernel) ||
                 find_weights(&down, &task->down, task->filter, task->kernel);
        if (!failed && task->tall_first && is_tall(task))
            failed = columns_first(task, &across, &down);
        else if (!failed)
            failed = rows_first(task, &across, &down);
    }
    free_axis(&across);
    free_axis(&down);
    return failed;
}

/* ---- the module ------------------------------------------------------------------------------ */

static int
is_rgb(const Py_buffer *pixels)
{
    return pixels->ndim == 3 && pixels->itemsize == 1 && pixels->shape[0] > 0 &&
           pixels->shape[1] > 0 && pixels->shape[2] == 3 && pixels->strides[1] == 3 &&
           pixels->strides[2] == 1;
}

static int
is_inside(const Span *span)
{
    return span->from >= 0 && span->from < span->to && span->to <= (float)span->length &&
           span->start >= 0 && span->start <= span->resized - span->count;
}

static int
find_named(Task *task, const char *filter, const char *instructions)
{
    for (size_t i = 0; i < sizeof filters / sizeof *filters; i++)
        if (!strcmp(filters[i].name, filter))
            task->filter = &filters[i];
    for (int i = 0; i < num_kernels; i++)
        if (!strcmp(kernels[i].name, instructions))
            task->kernel = &kernels[i];
    return task->filter && task->kernel ? 0 : -1;
}

static PyObject *
resize_checked(Task *task, const Py_buffer *source, const Py_buffer *out, const char *filter,
               const char *instructions)
{
    if (find_named(task, filter, instructions))
        return PyErr_Format(PyExc_ValueError, "unknown: %s or %s", filter, instructions);
    if (!is_rgb(source) || !is_rgb(out)) {
        PyErr_SetString(PyExc_ValueError, "pixels are bytes of shape (rows, columns, 3), dense rows");
        return NULL;
    }
    task->source = source->buf;
    task->source_stride = source->strides[0];
    task->out = out->buf;
    task->out_stride = out->strides[0];
    task->across.length = source->shape[1];
    task->across.count = out->shape[1];
    task->down.length = source->shape[0];
    task->down.count = out->shape[0];
    if (!is_inside(&task->across) || !is_inside(&task->down)) {
        PyErr_SetString(PyExc_ValueError, "the box or the window is empty, or not inside");
        return NULL;
    }
    int failed;
    Py_BEGIN_ALLOW_THREADS;
    failed = resize(task);
    Py_END_ALLOW_THREADS;
    if (failed)
        return PyErr_NoMemory();
    return Py_NewRef(Py_None);
}

static PyObject *
resize_into(PyObject *module, PyObject *arguments)
{
    Task task = {0};
    PyObject *source, *out;
    const char *filter, *instructions;
    Py_buffer from, to;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OO(ffff)(nn)(nn)sps", &out, &source, &task.across.from,
                          &task.down.from, &task.across.to, &task.down.to, &task.across.resized,
                          &task.down.resized, &task.across.start, &task.down.start, &filter,
                          &task.tall_first, &instructions))
        return NULL;
    if (PyObject_GetBuffer(source, &from, PyBUF_STRIDES))
        return NULL;
    if (PyObject_GetBuffer(out, &to, PyBUF_STRIDES | PyBUF_WRITABLE)) {
        PyBuffer_Release(&from);
        return NULL;
    }
    PyObject *done = resize_checked(&task, &from, &to, filter, instructions);
    PyBuffer_Release(&from);
    PyBuffer_Release(&to);
    return done;
}

static PyMethodDef methods[] = {
    {"resize_into", resize_into, METH_VARARGS, "See _resize.pyi."},
    {NULL, NULL, 0, NULL},
};

static int
add_names(PyObject *module)
{
    find_kernels();
    PyObject *names = PyTuple_New(num_kernels);
    for (int i = 0; names && i < num_kernels; i++) {
        PyObject *name = PyUnicode_FromString(kernels[i].name);
        if (!name || PyTuple_SetItem(names, i, name))
            Py_CLEAR(names);
    }
    int failed = !names || PyModule_AddObjectRef(module, "INSTRUCTIONS", names);
    Py_XDECREF(names);
    return failed ? -1 : 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, add_names},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_resize",
    .m_doc = "Resizing RGB as Pillow does, to the bit.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__resize(void)
{
    return PyModuleDef_Init(&definition);
}
