/* libcudart.so.13 over host memory, with kernels that do nothing; knobs are in machine.py.

What copies, allocates, launches or waits is noted in the trace, one line each. A copy that takes
time takes it where a GPU's does: a call that blocks, in the call; one from page-locked memory, in
the wait for its stream. */
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#undef cudaGetDeviceProperties

extern "C" void standin_trace(const char *format, ...);

namespace {

enum class Place { pageable, device, pinned };

struct Block {
    size_t size;
    Place place;
    int device;
};

struct Stream {
    int device;
    std::atomic<int> busy_ms{0};
};

std::mutex lock;
std::map<const char *, Block> blocks;
std::map<int, size_t> used;
std::atomic<int> lost{0};
std::atomic<bool> is_full{false};
thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;

const char *text(const char *name) {
    const char *found = getenv(name);
    return found && *found ? found : nullptr;
}

long told(const char *name, long otherwise) {
    const char *found = text(name);
    return found ? atol(found) : otherwise;
}


/* STANDIN_FAULT=CALL:CODE:N - the Nth call of that kind fails, and all of that kind after it; all
   others too, where the code is one after which a process has lost its device. Where
   STANDIN_FAULT_ONCE names a file, only in the process that makes it. */
struct Fault {
    std::string call;
    int code = 0;
    long number = 0;
    std::atomic<long> count{0};

    Fault() {
        char name[32];
        if (text("STANDIN_FAULT") && sscanf(text("STANDIN_FAULT"), "%31[^:]:%d:%ld", name, &code, &number) == 3)
            call = name;
    }

    bool is_due(const char *kind) {
        if (call != kind || ++count < number) return false;
        const char *once = text("STANDIN_FAULT_ONCE");
        if (count > number || !once) return true;
        int file = open(once, O_WRONLY | O_CREAT | O_EXCL, 0644);
        if (file < 0) {
            call.clear();
            return false;
        }
        close(file);
        return true;
    }
};

cudaError_t failed(cudaError_t code) { return last = code; }

cudaError_t result(const char *kind) {
    static Fault fault;
    static std::mutex one;
    if (lost) return failed((cudaError_t)lost.load());
    std::lock_guard<std::mutex> held(one);
    if (!fault.is_due(kind)) return cudaSuccess;
    standin_trace("fault %s %d\n", kind, fault.code);
    bool is_of_host = fault.call == "pin" || fault.call == "register";
    if (fault.code == cudaErrorMemoryAllocation) is_full = !is_of_host;
    else if (!is_of_host) lost = fault.code;
    return failed((cudaError_t)fault.code);
}

/* Compute mode EXCLUSIVE_PROCESS: whoever has the lock of a file in STANDIN_EXCLUSIVE has the GPU. */
cudaError_t entered(int device) {
    static std::mutex one;
    static std::map<int, int> files;
    const char *folder = text("STANDIN_EXCLUSIVE");
    if (!folder) return cudaSuccess;
    std::lock_guard<std::mutex> held(one);
    if (files.count(device)) return cudaSuccess;
    std::string name = std::string(folder) + "/gpu" + std::to_string(device);
    int file = open(name.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (flock(file, LOCK_EX | LOCK_NB)) {
        close(file);
        return cudaErrorDevicesUnavailable;
    }
    files[device] = file;
    return cudaSuccess;
}

size_t capacity() { return told("STANDIN_MEMORY_MB", 80000) * size_t(1000000); }

Block found(const void *pointer) {
    std::lock_guard<std::mutex> held(lock);
    auto next = blocks.upper_bound((const char *)pointer);
    if (next != blocks.begin()) {
        --next;
        if ((const char *)pointer < next->first + next->second.size) return next->second;
    }
    return {0, Place::pageable, -1};
}

std::string name(const Block &block) {
    if (block.place == Place::device) return "gpu" + std::to_string(block.device);
    return block.place == Place::pinned ? "pinned" : "pageable";
}

cudaError_t allocate(void **pointer, size_t size, Place place) {
    *pointer = nullptr;
    bool on_device = place == Place::device;
    if (cudaError_t code = entered(current)) return failed(code);
    if (cudaError_t code = result(on_device ? "malloc" : "pin")) return code;
    std::lock_guard<std::mutex> held(lock);
    if (on_device && used[current] + size > capacity()) return failed(cudaErrorMemoryAllocation);
    *pointer = calloc((size + 4095) / 4096 + 1, 4096);
    blocks[(const char *)*pointer] = {size, place, current};
    if (on_device) used[current] += size;
    standin_trace("%s %zu gpu%d\n", on_device ? "malloc" : "pin", size, current);
    return cudaSuccess;
}

void forget(void *pointer) {
    std::lock_guard<std::mutex> held(lock);
    auto block = blocks.find((const char *)pointer);
    if (block == blocks.end()) return;
    if (block->second.place == Place::device) used[block->second.device] -= block->second.size;
    blocks.erase(block);
}

cudaError_t release(void *pointer) {
    forget(pointer);
    free(pointer);
    return lost ? failed((cudaError_t)lost.load()) : cudaSuccess;
}

cudaError_t copy(void *to, const void *from, size_t size, Stream *stream, bool is_async) {
    if (cudaError_t code = result("copy")) return code;
    Block target = found(to), source = found(from);
    standin_trace("copy %s %zu %s>%s gpu%d\n", is_async ? "async" : "blocking", size, name(source).c_str(),
          name(target).c_str(), current);
    memcpy(to, from, size);
    static const int copy_ms = told("STANDIN_COPY_MS", 0);
    if (!copy_ms || size < 1000000 || source.place == target.place) return cudaSuccess;
    bool is_staged = source.place == Place::pageable || target.place == Place::pageable;
    if (is_async && !is_staged && stream) stream->busy_ms += copy_ms;
    else usleep(copy_ms * 1000);
    return cudaSuccess;
}

template <class Handle> void hand_out(Handle *handle) {
    static std::atomic<long> next{0x1000};
    *handle = (Handle)(next += 16);
}

struct Call {
    dim3 grid, block;
    size_t shared;
    void *stream;
};
thread_local Call calls[8];
thread_local unsigned num_calls = 0;

cudaError_t launched(const void *stream) {
    if (cudaError_t code = result("launch")) return code;
    int device = stream ? ((const Stream *)stream)->device : current;
    standin_trace("launch gpu%d%s\n", device, device == current ? "" : " ASTRAY");
    return cudaSuccess;
}

} // namespace

extern "C" {

/* ---- shared with cudnn.cpp ---- */

void standin_trace(const char *format, ...) {
    static const int file =
        text("STANDIN_TRACE") ? open(text("STANDIN_TRACE"), O_WRONLY | O_APPEND | O_CREAT, 0644) : -1;
    if (file < 0) return;
    char line[256];
    va_list rest;
    va_start(rest, format);
    int size = vsnprintf(line, sizeof line, format, rest);
    va_end(rest);
    if (write(file, line, size) != size) abort();
}
int standin_fault(const char *kind) { return result(kind); }

/* ---- devices ---- */

cudaError_t cudaGetDeviceCount(int *count) {
    *count = told("STANDIN_GPUS", 1);
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    current = device;
    if (cudaError_t code = entered(device)) return failed(code);
    return lost ? failed((cudaError_t)lost.load()) : cudaSuccess;
}
cudaError_t cudaGetDevice(int *device) {
    *device = current;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *found, int) {
    int arch = told("STANDIN_ARCH", 90);
    *found = {};
    strcpy(found->name, "Stand-in");
    found->major = arch / 10;
    found->minor = arch % 10;
    found->totalGlobalMem = capacity();
    found->multiProcessorCount = 132;
    found->warpSize = 32;
    found->maxThreadsPerBlock = found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
    found->maxThreadsDim[2] = 64;
    found->maxGridSize[0] = 2147483647;
    found->maxGridSize[1] = found->maxGridSize[2] = 65535;
    found->maxThreadsPerMultiProcessor = 2048;
    found->maxBlocksPerMultiProcessor = 32;
    found->regsPerBlock = found->regsPerMultiprocessor = 65536;
    found->sharedMemPerBlock = 49152;
    found->sharedMemPerBlockOptin = 232448;
    found->sharedMemPerMultiprocessor = 233472;
    found->l2CacheSize = 50 << 20;
    found->unifiedAddressing = 1;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp all;
    cudaGetDeviceProperties(&all, device);
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = all.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = all.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = all.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = all.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = all.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = all.maxThreadsPerBlock; break;
    case cudaDevAttrWarpSize: *value = all.warpSize; break;
    default: *value = 1;
    }
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) {
    *version = told("STANDIN_DRIVER", 13000);
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

/* ---- errors ---- */

const char *cudaGetErrorName(cudaError_t code) {
    switch (code) {
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorDevicesUnavailable: return "cudaErrorDevicesUnavailable";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorECCUncorrectable: return "cudaErrorECCUncorrectable";
    default: return "cudaErrorOfTheStandIn";
    }
}
const char *cudaGetErrorString(cudaError_t code) {
    switch (code) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorDevicesUnavailable: return "CUDA-capable device(s) is/are busy or unavailable";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorECCUncorrectable: return "uncorrectable ECC error encountered";
    case cudaErrorNotSupported: return "operation not supported";
    default: return "error of the stand-in";
    }
}
cudaError_t cudaPeekAtLastError() { return last; }
cudaError_t cudaGetLastError() {
    cudaError_t code = last;
    last = lost ? (cudaError_t)lost.load() : cudaSuccess;
    return code;
}

/* ---- memory ---- */

cudaError_t cudaMalloc(void **pointer, size_t size) { return allocate(pointer, size, Place::device); }
cudaError_t cudaMallocFromPoolAsync(void **pointer, size_t size, cudaMemPool_t, cudaStream_t) {
    return allocate(pointer, size, Place::device);
}
cudaError_t cudaMallocHost(void **pointer, size_t size) {
    return allocate(pointer, size, Place::pinned);
}
cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned) {
    return allocate(pointer, size, Place::pinned);
}
cudaError_t cudaFree(void *pointer) { return release(pointer); }
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t) { return release(pointer); }
cudaError_t cudaFreeHost(void *pointer) { return release(pointer); }
cudaError_t cudaHostRegister(void *pointer, size_t size, unsigned) {
    if (cudaError_t code = result("register")) return code;
    std::lock_guard<std::mutex> held(lock);
    blocks[(const char *)pointer] = {size, Place::pinned, current};
    standin_trace("register %zu gpu%d\n", size, current);
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *pointer) {
    forget(pointer);
    standin_trace("unregister gpu%d\n", current);
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    std::lock_guard<std::mutex> held(lock);
    *total = capacity();
    *free = is_full ? 0 : *total - used[current];
    return lost ? failed((cudaError_t)lost.load()) : cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *found_here, const void *pointer) {
    Block block = found(pointer);
    *found_here = {};
    found_here->type = block.place == Place::device   ? cudaMemoryTypeDevice
                       : block.place == Place::pinned ? cudaMemoryTypeHost
                                                      : cudaMemoryTypeUnregistered;
    found_here->device = block.device;
    found_here->devicePointer = found_here->hostPointer = (void *)pointer;
    return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void *value) {
    *(unsigned long long *)value = 0;
    return cudaSuccess;
}

/* ---- copies ---- */

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind) {
    return copy(to, from, size, nullptr, false);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
    return copy(to, from, size, (Stream *)stream, true);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t) {
    for (size_t row = 0; row < height; row++)
        memcpy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return cudaSuccess;
}
cudaError_t cudaMemcpyFromSymbol(void *to, const void *, size_t size, size_t, cudaMemcpyKind) {
    memset(to, 0, size);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *to, int value, size_t size) {
    memset(to, value, size);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t) {
    memset(to, value, size);
    return cudaSuccess;
}

/* ---- streams, graphs, events ---- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    if (lost) return failed((cudaError_t)lost.load());
    *stream = (cudaStream_t) new Stream{current};
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithFlags(stream, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; } /* a late call may name it yet */
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (cudaError_t code = result("sync")) return code;
    standin_trace("sync gpu%d\n", stream ? ((Stream *)stream)->device : current);
    if (stream) usleep(1000 * ((Stream *)stream)->busy_ms.exchange(0));
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    return lost ? failed((cudaError_t)lost.load()) : cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph) {
    hand_out(graph);
    standin_trace("captured gpu%d\n", current);
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *graph, cudaGraph_t, unsigned long long) {
    hand_out(graph);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t stream) {
    standin_trace("replay gpu%d\n", ((Stream *)stream)->device);
    return result("launch");
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t) {
    *ms = 0.001f;
    return cudaSuccess;
}

/* ---- kernels ---- */

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *found, const void *) {
    *found = {};
    found->maxThreadsPerBlock = 1024;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *number, const void *, int, size_t,
                                                                   unsigned) {
    *number = 2;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *, void **pointer, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult *status) {
    *pointer = nullptr;
    if (status) *status = cudaDriverEntryPointSymbolNotFound;
    return cudaErrorSymbolNotFound;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void *argument) {
    function(argument);
    return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t stream) {
    return launched(stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t stream) {
    return launched(stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *, void **) {
    return launched(config->stream);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void **, size_t, cudaStream_t stream) {
    return launched(stream);
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}
void **__cudaRegisterFatBinary(void *) {
    static void *handle;
    return &handle;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    calls[num_calls++ % 8] = {grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    const Call &call = calls[--num_calls % 8];
    *grid = call.grid;
    *block = call.block;
    *shared = call.shared;
    *(void **)stream = call.stream;
    return cudaSuccess;
}
}
