// A driver of CUDA 13.0 with two devices and nothing behind it: it writes what it is asked for to stderr.
// The test gives it to the real cuda-core in the place of libcuda.so.1.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void* Handle;
enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500 };

#define SAY(...) (fprintf(stderr, "cu: " __VA_ARGS__), fputc('\n', stderr))

static const char* names[16];
static unsigned loaded = 0;
static __thread uintptr_t context = 0;

static const char* name_of(Handle kernel) { return names[(uintptr_t)kernel - 1]; }

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGetCount(int* count) { return *count = 2, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) { return *value = 1000 * attribute + device, 0; }
int cuCtxGetCurrent(Handle* now) { return *now = (Handle)context, 0; }
int cuCtxSetCurrent(Handle to) { return context = (uintptr_t)to, SAY("context %zu", context), 0; }
int cuDevicePrimaryCtxRetain(Handle* to, int device) { return *to = (Handle)(uintptr_t)(100 + device), 0; }

int cuLibraryLoadData(Handle* library, const char* code, Handle a, Handle b, unsigned c, Handle d, Handle e, unsigned f) {
    if (getenv("STUB_NO_MEMORY")) return OUT_OF_MEMORY;
    SAY("library %.3s", code + 1);
    return *library = (Handle)1, 0;
}

int cuLibraryUnload(Handle library) { return 0; }

int cuLibraryGetKernel(Handle* kernel, Handle library, const char* name) {
    names[loaded] = strdup(name);
    return *kernel = (Handle)(uintptr_t)++loaded, 0;
}

int cuKernelGetLibrary(Handle* library, Handle kernel) { return *library = (Handle)1, 0; }

int cuKernelGetFunction(Handle* function, Handle kernel) {
    SAY("function %s", name_of(kernel));
    return *function = kernel, 0;
}

int cuKernelSetAttribute(int attribute, int value, Handle kernel, int device) {
    SAY("attribute %d of %s = %d on %d", attribute, name_of(kernel), value, device);
    return 0;
}

// `one` has a pointer and 32 bits, `two` has two pointers
int cuKernelGetParamInfo(Handle kernel, size_t index, size_t* offset, size_t* size) {
    if (index >= 2) return INVALID_VALUE;
    *offset = 8 * index;
    *size = index == 1 && !strcmp(name_of(kernel), "one") ? 4 : 8;
    return 0;
}

struct Config {
    unsigned grid[3], block[3], shared;
    Handle stream, attributes;
    unsigned attribute_count;
};

int cuLaunchKernelEx(const struct Config* c, Handle kernel, void** values, void** extra) {
    SAY("launch %s grid %u %u %u block %u %u %u shared %u stream %zx attributes %u values %llx %x", name_of(kernel),
        c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared, (size_t)c->stream,
        c->attribute_count, *(unsigned long long*)values[0], *(unsigned*)values[1]);
    return 0;
}

int cuGetErrorName(int status, const char** text) {
    return *text = status == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_INVALID_VALUE", 0;
}

int cuGetErrorString(int status, const char** text) { return *text = "it says", 0; }

int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, int* status) {
    *function = dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), name);
    if (status) *status = *function == NULL;
    return *function ? 0 : NOT_FOUND;
}

int cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
