/* libcuda.so.1 as far as it is asked for the state of the machine; knobs are in machine.py. */
#include <stdio.h>
#include <stdlib.h>

enum { MAJOR = 75, MINOR = 76 }; /* of CUdevice_attribute */

static int told(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}
int cuInit(unsigned flags) { return told("STANDIN_INIT", 0); }
int cuDriverGetVersion(int *version) {
    *version = told("STANDIN_DRIVER", 13000);
    return 0;
}
int cuDeviceGetCount(int *count) {
    *count = told("STANDIN_GPUS", 1);
    return 0;
}
int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return 0;
}
int cuDeviceGetName(char *name, int size, int device) {
    snprintf(name, size, "Stand-in");
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int arch = told("STANDIN_ARCH", 90);
    *value = attribute == MAJOR ? arch / 10 : attribute == MINOR ? arch % 10 : 0;
    return 0;
}
int cuTensorMapEncodeTiled(void) { return 801; } /* what ONNX Runtime links with */
