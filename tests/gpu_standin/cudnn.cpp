/* libcudnn.so.9, of which the backend that chooses and runs engines says what it is asked for.

STANDIN_ENGINES: the engines that its heuristics offer for each convolution, best first. t: on the
tensor cores; d: so too, having rounded its inputs; p: plain. What runs is noted in the trace. */
#include <cudnn.h>

#include <cstdlib>
#include <cstring>

/* Of runtime.cpp. Weak, so that this library loads beside a real runtime, too. */
extern "C" __attribute__((weak)) void standin_trace(const char *format, ...);
extern "C" __attribute__((weak)) int standin_fault(const char *kind);

namespace {

struct Descriptor {
    cudnnBackendDescriptorType_t type;
    char engine;
};

const char *engines() {
    const char *found = getenv("STANDIN_ENGINES");
    return found ? found : "tp";
}

cudnnStatus_t status(int code) { return (cudnnStatus_t)code; }

/* Fill in what fits of a list, and say how long it is. */
int listed(const int *values, int number, int64_t room, void *out) {
    for (int at = 0; at < number && at < room; at++) ((int *)out)[at] = values[at];
    return number;
}

int notes(char engine, int64_t room, void *out) {
    const int all[] = {CUDNN_NUMERICAL_NOTE_TENSOR_CORE, CUDNN_NUMERICAL_NOTE_DOWN_CONVERT_INPUTS};
    return listed(all, engine == 'd' ? 2 : engine == 't' ? 1 : 0, out ? room : 0, out);
}

int offered(int64_t room, void *out) {
    int number = strlen(engines());
    if (!out || !room) return number;
    if (room < number) number = room;
    for (int at = 0; at < number; at++) ((Descriptor **)out)[at]->engine = engines()[at];
    return number;
}

void zero(cudnnBackendAttributeType_t type, void *out) {
    switch (type) {
    case CUDNN_TYPE_INT64: *(int64_t *)out = 0; break;
    case CUDNN_TYPE_INT32: *(int32_t *)out = 0; break;
    case CUDNN_TYPE_BOOLEAN: *(bool *)out = false; break;
    default: break;
    }
}

} // namespace

extern "C" {

size_t cudnnGetVersion() { return CUDNN_VERSION; }
size_t cudnnGetCudartVersion() { return 13000; }
const char *cudnnGetErrorString(cudnnStatus_t code) {
    switch ((int)code) {
    case CUDNN_STATUS_SUCCESS: return "CUDNN_STATUS_SUCCESS";
    case CUDNN_STATUS_ALLOC_FAILED: return "CUDNN_STATUS_ALLOC_FAILED";
    case CUDNN_STATUS_EXECUTION_FAILED: return "CUDNN_STATUS_EXECUTION_FAILED";
    default: return "CUDNN_STATUS_OF_THE_STAND_IN";
    }
}
void cudnnGetLastErrorString(char *message, size_t size) {
    if (size) *message = 0;
}
cudnnStatus_t cudnnGetReductionWorkspaceSize(cudnnHandle_t, const cudnnReduceTensorDescriptor_t,
                                             const cudnnTensorDescriptor_t, const cudnnTensorDescriptor_t,
                                             size_t *size) {
    *size = 0;
    return status(0);
}
cudnnStatus_t cudnnGetReductionIndicesSize(cudnnHandle_t, const cudnnReduceTensorDescriptor_t,
                                           const cudnnTensorDescriptor_t, const cudnnTensorDescriptor_t,
                                           size_t *size) {
    *size = 0;
    return status(0);
}
cudnnStatus_t cudnnGetStream(cudnnHandle_t, cudaStream_t *stream) {
    *stream = nullptr;
    return status(0);
}

cudnnStatus_t cudnnAddTensor(cudnnHandle_t, const void *, const cudnnTensorDescriptor_t, const void *,
                             const void *, const cudnnTensorDescriptor_t, void *) {
    standin_trace("bias\n");
    return status(0);
}

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type,
                                           cudnnBackendDescriptor_t *made) {
    *made = new Descriptor{type, '?'};
    return status(0);
}
cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t one) {
    delete (Descriptor *)one;
    return status(0);
}
cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t one, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t, int64_t, const void *value) {
    if (name == CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG)
        ((Descriptor *)one)->engine = (*(Descriptor *const *)value)->engine;
    return status(0);
}
cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t one, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t room, int64_t *count,
                                       void *out) {
    char engine = ((Descriptor *)one)->engine;
    int number = 1;
    switch (name) {
    case CUDNN_ATTR_ENGINEHEUR_RESULTS: number = offered(room, out); break;
    case CUDNN_ATTR_ENGINECFG_ENGINE: ((Descriptor **)out)[0]->engine = engine; break;
    case CUDNN_ATTR_ENGINE_NUMERICAL_NOTE: number = notes(engine, room, out); break;
    case CUDNN_ATTR_ENGINE_BEHAVIOR_NOTE:
    case CUDNN_ATTR_ENGINE_KNOB_INFO:
    case CUDNN_ATTR_ENGINECFG_KNOB_CHOICES: number = 0; break;
    default:
        if (out && room) zero(type, out);
    }
    if (count) *count = number;
    return status(0);
}
cudnnStatus_t cudnnBackendExecute(cudnnHandle_t, cudnnBackendDescriptor_t plan, cudnnBackendDescriptor_t) {
    standin_trace("engine %c\n", ((Descriptor *)plan)->engine);
    int code = standin_fault("execute");
    return !code                                 ? CUDNN_STATUS_SUCCESS
           : code == cudaErrorMemoryAllocation ? CUDNN_STATUS_ALLOC_FAILED
                                                 : CUDNN_STATUS_EXECUTION_FAILED;
}
}
