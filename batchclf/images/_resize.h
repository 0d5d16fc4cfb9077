/* What _resize.c and its kernels share.

   Each output is a sum over some inputs of its row or column, its taps. Taps go in groups of four.
   A `Kernel` is an instruction set: how it packs the weights of a group, and how it sums up. */

#ifndef BATCHCLF_RESIZE_H
#define BATCHCLF_RESIZE_H

#include <stddef.h>
#include <stdint.h>

#define BITS 22 /* of fixed point: 32 - 8 - 2, as Pillow has it */
#define HALF (1 << (BITS - 1))
#define GROUP 4

typedef uint8_t Byte;
typedef int32_t Weights[GROUP];

/* What the outputs of a window, in one direction, are made of. */
typedef struct {
    ptrdiff_t count;    /* outputs */
    ptrdiff_t groups;   /* of taps, of the output with the most */
    ptrdiff_t *first;   /* the first input of each output */
    ptrdiff_t *taps;    /* how many inputs each has */
    Weights *weights;   /* [group * count + output], zero beyond the taps */
    Weights *packed;    /* the same as the kernel wants it */
    ptrdiff_t num_safe; /* outputs for which a kernel may read 16 bytes for each group */
    int is_copy;        /* each output is one input, the next that of the next */
} Axis;

typedef struct {
    const char *name;
    void (*pack)(const int32_t *weights, int32_t *packed);
    /* Sums along a row, for as many outputs as suit it; how many. */
    ptrdiff_t (*across)(Byte *out, const Byte *row, const Axis *axis);
    /* Sums over rows, one for each tap, for as many bytes as suit it; how many. */
    ptrdiff_t (*down)(Byte *out, const Byte *const *rows, const Axis *axis, ptrdiff_t output,
                      ptrdiff_t num_bytes);
} Kernel;

#define MAX_KERNELS 3

/* Find the kernels that this CPU has, the fastest first; how many. The last, `plain`, has no
   functions: it is what the two below do, for it all or for what another kernel leaves. */
int find_kernels(Kernel kernels[MAX_KERNELS]);

void across_plain(Byte *out, const Byte *row, const Axis *axis, ptrdiff_t from);
void down_plain(Byte *out, const Byte *const *rows, const Axis *axis, ptrdiff_t output,
                ptrdiff_t from, ptrdiff_t num_bytes);

#endif
