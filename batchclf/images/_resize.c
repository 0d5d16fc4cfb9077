/* Resizing RGB as Pillow does, to the bit, but only what a window of the result needs.

   The arithmetic is that of Pillow's src/libImaging/Resample.c: weights are doubles that add up to
   one, rounded to fixed point of 22 bits; sums are 32 bits wide and wrap. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_resize.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define PI 3.14159265358979323846

static Kernel kernels[MAX_KERNELS];
static int num_kernels;

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
    /* Beyond 2^24 single precision may round the length up. */
    int is_there = (Py_ssize_t)span->from + span->start + span->count <= span->length;
    axis->is_copy = scale == 1.0 && span->from == floorf(span->from) && is_there;
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
    Byte *kept = calloc(num_kept, row_bytes);
    const Byte **rows = calloc(num_kept, sizeof *rows);
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
        for (size_t t = 0; t < num_kept; t++)  /* beyond the taps, others for weights of zero */
            rows[t] = kept + ((size_t)first + t) % num_kept * row_bytes;
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
    const Byte **rows = calloc((size_t)(GROUP * down->groups), sizeof *rows);
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
        PyErr_SetString(PyExc_ValueError, "pixels are dense rows of shape (rows, columns, 3)");
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
    num_kernels = find_kernels(kernels);
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
