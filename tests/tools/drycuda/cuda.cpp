// The CUDA runtime and driver: memory, streams, events, captures and kernels that compute nothing.
// The device says that it is an H100. Device memory is host memory, so copies do copy.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "log.h"

static_assert(CUDART_VERSION >= 13000, "the dry CUDA has the interface of CUDA 13");

namespace {

constexpr size_t PAGE = 2 << 20;  // torch expects at least 512 bytes
constexpr size_t MEMORY = 80ull << 30;
constexpr size_t LARGEST_COPY_BACK = 4 << 20;  // larger ones are slow, and hold nothing

std::mutex& mutex = *new std::mutex;
using Lock = std::lock_guard<std::mutex>;
using Ranges = std::map<uintptr_t, size_t>;
Ranges& on_device = *new Ranges;
Ranges& pinned = *new Ranges;
auto& kernel_names = *new std::map<const void*, std::string>;
auto& graph_sizes = *new std::map<const void*, size_t>;
int last_error = 0;

struct Launch {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local Launch configured;

cudaError_t refuse(const char* call) {
  last_error = dry::refuse(call);
  return static_cast<cudaError_t>(last_error);
}

bool contains(const Ranges& ranges, const void* pointer) {
  Lock lock(mutex);
  auto address = reinterpret_cast<uintptr_t>(pointer);
  auto after = ranges.upper_bound(address);
  return after != ranges.begin() && address < std::prev(after)->first + std::prev(after)->second;
}

std::string place(const void* pointer) {
  return contains(on_device, pointer) ? "device" : contains(pinned, pointer) ? "pinned" : "host";
}

std::string moved(const void* to, const void* from, size_t bytes) {
  return place(from) + " to " + place(to) + " " + std::to_string(bytes);
}

void copy(void* to, const void* from, size_t bytes) {
  if (bytes <= LARGEST_COPY_BACK || !contains(on_device, from)) memcpy(to, from, bytes);
}

cudaError_t launch(const void* kernel, dim3 grid, void* stream) {
  std::string name = "?";
  {
    Lock lock(mutex);
    auto known = kernel_names.find(kernel);
    if (known != kernel_names.end()) name = known->second;
  }
  int status = 0;
  if (char* readable = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status)) {
    name = readable;
    free(readable);
  }
  dry::work("kernel", name + " x" + std::to_string(size_t(grid.x) * grid.y * grid.z), stream);
  return cudaSuccess;
}

template <class T>
void name_kernel(T kernel, const char* name) {
  Lock lock(mutex);
  kernel_names[reinterpret_cast<const void*>(kernel)] = name;
}

int attribute(int which) {
  switch (which) {
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: return 65535;
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    default: return 1;
  }
}

}  // namespace

extern "C" {

// Kernels: the compiler of a library registers each by its host function.

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  name_kernel(host, name);
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configured = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configured.grid, *block = configured.block, *shared = configured.shared;
  *static_cast<void**>(stream) = configured.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3, void**, size_t,
                               cudaStream_t stream) {
  return launch(kernel, grid, stream);
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3, void**, size_t,
                             cudaStream_t stream) {
  return launch(kernel, grid, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  return launch(kernel, config->gridDim, config->stream);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024, found->numRegs = 32;
  found->ptxVersion = found->binaryVersion = 90, found->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int,
                                                                   size_t, unsigned) {
  *blocks = 4;
  return cudaSuccess;
}

// The device.

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return static_cast<cudaError_t>(last_error); }
cudaError_t cudaGetLastError() {
  auto error = cudaPeekAtLastError();
  last_error = 0;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error ? "operation not permitted when stream is capturing" : "no error";
}
const char* cudaGetErrorName(cudaError_t error) {
  return error ? "cudaErrorStreamCaptureUnsupported" : "cudaSuccess";
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
  memset(found, 0, sizeof *found);
  strcpy(found->name, "dry H100");
  found->major = 9, found->minor = 0, found->warpSize = 32, found->totalGlobalMem = MEMORY;
  found->multiProcessorCount = 132, found->l2CacheSize = 50 << 20, found->memoryBusWidth = 5120;
  found->maxThreadsPerBlock = 1024, found->maxThreadsPerMultiProcessor = 2048;
  found->maxBlocksPerMultiProcessor = 32, found->textureAlignment = 512;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->sharedMemPerBlock = 49152, found->sharedMemPerBlockOptin = 232448;
  found->sharedMemPerMultiprocessor = 233472, found->cooperativeLaunch = 1;
  found->maxGridSize[0] = 2147483647, found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024, found->maxThreadsDim[2] = 64;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = attribute(which), cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int, int) {
  return strcpy(text, "0000:00:00.0"), cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceSynchronize() {
  if (dry::unsafe()) return refuse("cudaDeviceSynchronize");
  return dry::note("sync", "cudaDeviceSynchronize"), cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return *free = MEMORY - (2ull << 30), *total = MEMORY, cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *found = dlsym(RTLD_DEFAULT, name);
  if (result)
    *result = *found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** found, const void* symbol) {
  return *found = const_cast<void*>(symbol), cudaSuccess;
}

// Memory.

cudaError_t cudaMalloc(void** found, size_t bytes) {
  if (dry::unsafe()) return refuse("cudaMalloc");
  bytes = (bytes + PAGE - 1) / PAGE * PAGE;
  // NORESERVE: a page costs memory only once something is written to it.
  void* start = mmap(nullptr, bytes + PAGE, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return cudaErrorMemoryAllocation;
  auto address = (reinterpret_cast<uintptr_t>(start) + PAGE - 1) / PAGE * PAGE;
  *found = reinterpret_cast<void*>(address);
  dry::note("allocate", std::to_string(bytes));
  Lock lock(mutex);
  on_device[address] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  if (pointer == nullptr) return cudaSuccess;
  if (dry::unsafe()) return refuse("cudaFree");
  Lock lock(mutex);
  auto known = on_device.find(reinterpret_cast<uintptr_t>(pointer));
  if (known == on_device.end()) return cudaErrorInvalidValue;
  dry::note("free", std::to_string(known->second));
  munmap(pointer, known->second);
  on_device.erase(known);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** found, size_t bytes, unsigned) {
  if (dry::unsafe()) return refuse("cudaHostAlloc");
  *found = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  Lock lock(mutex);
  pinned[reinterpret_cast<uintptr_t>(*found)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* pointer) {
  Lock lock(mutex);
  pinned.erase(reinterpret_cast<uintptr_t>(pointer));
  free(pointer);
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
  memset(found, 0, sizeof *found);
  found->type = contains(on_device, pointer) ? cudaMemoryTypeDevice
                : contains(pinned, pointer)  ? cudaMemoryTypeHost
                                             : cudaMemoryTypeUnregistered;
  found->devicePointer = found->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  dry::work("copy", moved(to, from, bytes), stream);
  if (!dry::captured(stream)) copy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (dry::unsafe()) return refuse("cudaMemcpy");
  dry::note("sync", "cudaMemcpy " + moved(to, from, bytes));
  return copy(to, from, bytes), cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t, const void* from, size_t, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t stream) {
  return dry::work("copy", moved(to, from, width * height), stream), cudaSuccess;
}
cudaError_t cudaMemset(void*, int, size_t) {
  return dry::unsafe() ? refuse("cudaMemset") : cudaSuccess;
}
cudaError_t cudaMemsetAsync(void*, int, size_t bytes, cudaStream_t stream) {
  return dry::work("fill", std::to_string(bytes), stream), cudaSuccess;
}

// Streams and events.

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return *stream = static_cast<cudaStream_t>(dry::handle()), cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return dry::captured(stream) ? refuse("cudaStreamQuery") : cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  bool legacy = stream == nullptr && dry::unsafe();
  if (dry::captured(stream) || legacy) return refuse("cudaStreamSynchronize");
  return dry::note("sync", "cudaStreamSynchronize"), cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (dry::wait_for_event(stream, event)) return cudaSuccess;
  return refuse("cudaStreamWaitEvent for an event of another stream");
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = static_cast<cudaEvent_t>(dry::handle()), cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return dry::record_event(event, stream), cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return dry::record_event(event, stream), cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  bool forbidden = dry::captured_event(event) || dry::unsafe();
  return forbidden ? refuse("cudaEventQuery") : cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (dry::captured_event(event)) return refuse("cudaEventSynchronize");
  return dry::note("sync", "cudaEventSynchronize"), cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  return *milliseconds = 0.01f, cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  if (!dry::captured(stream)) function(data);
  return cudaSuccess;
}

// Captures and graphs.

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  *mode = static_cast<cudaStreamCaptureMode>(dry::exchange_mode(*mode));
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return dry::begin(stream, mode), cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = static_cast<cudaGraph_t>(dry::handle());
  size_t nodes = dry::end();
  Lock lock(mutex);
  graph_sizes[*graph] = nodes;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  bool active = dry::captured(stream);
  *status = active ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* number, cudaGraph_t* graph,
                                     const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
  if (number) *number = dry::capture_number();
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(1);
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  Lock lock(mutex);
  return *count = graph_sizes[graph], cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* ready, cudaGraph_t graph,
                                          unsigned long long) {
  *ready = static_cast<cudaGraphExec_t>(dry::handle());
  Lock lock(mutex);
  graph_sizes[*ready] = graph_sizes[graph];
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  if (dry::captured(stream)) return refuse("cudaGraphLaunch");
  Lock lock(mutex);
  dry::work("replay", std::to_string(graph_sizes[graph]), stream);
  return cudaSuccess;
}

// The driver, which Triton calls.

CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGetName(char* text, int, CUdevice) { return strcpy(text, "dry H100"), CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  return *value = attribute(which), CUDA_SUCCESS;  // numbered as those of the runtime
}
CUresult cuDeviceTotalMem(size_t* bytes, CUdevice) { return *bytes = MEMORY, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* context) {
  return *context = reinterpret_cast<CUcontext>(1), CUDA_SUCCESS;
}
CUresult cuCtxPopCurrent(CUcontext* context) {
  if (context) cuCtxGetCurrent(context);
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { return cuCtxGetCurrent(context); }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void*) {
  if (dry::unsafe()) return static_cast<CUresult>(refuse("cuModuleLoadData"));
  return *module = static_cast<CUmodule>(dry::handle()), CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule* module, const void*, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(module, nullptr);
}
CUresult cuModuleLoad(CUmodule* module, const char*) { return cuModuleLoadData(module, nullptr); }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  *function = static_cast<CUfunction>(dry::handle());
  return name_kernel(*function, name), CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
  *value = which == CU_FUNC_ATTRIBUTE_NUM_REGS                ? 32
           : which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
                                                              : 0;
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction kernel, unsigned x, unsigned y, unsigned z, unsigned, unsigned,
                        unsigned, unsigned, CUstream stream, void**, void**) {
  return static_cast<CUresult>(launch(kernel, dim3(x, y, z), stream));
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction kernel, void**, void**) {
  return cuLaunchKernel(kernel, config->gridDimX, config->gridDimY, config->gridDimZ, 0, 0, 0, 0,
                        config->hStream, nullptr, nullptr);
}
CUresult cuGetErrorString(CUresult, const char** text) { return *text = "refused", CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult, const char** text) { return *text = "refused", CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction, int, size_t) {
  return *blocks = 4, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig*) {
  return *clusters = 1, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr pointer) {
  if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    *static_cast<CUdeviceptr*>(value) = pointer;
  else
    *static_cast<int*>(value) = CU_MEMORYTYPE_DEVICE;
  return CUDA_SUCCESS;
}
}
