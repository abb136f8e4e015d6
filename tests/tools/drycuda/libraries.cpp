// cuBLAS and cuDNN: a product, convolution or normalisation is one entry of the log.

// cuBLAS declares functions of these types, whose headers need one that torch's packages lack.
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
struct __half;
struct __nv_bfloat16;

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cudnn.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#include "log.h"

namespace {

struct Handle {
  cudaStream_t stream = nullptr;
};

template <class T>
cudaStream_t stream_of(T handle) {
  return reinterpret_cast<Handle*>(handle)->stream;
}

template <class T>
void create(T* handle) {
  *handle = reinterpret_cast<T>(new Handle);
}

cublasStatus_t product(const char* name, int m, int n, int k, cudaStream_t stream) {
  std::string sizes = std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k);
  dry::work("product", std::string(name) + " " + sizes, stream);
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

extern "C" {

cublasStatus_t cublasCreate(cublasHandle_t* handle) {
  return create(handle), CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream) {
  return reinterpret_cast<Handle*>(handle)->stream = stream, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* mode) {
  return *mode = CUBLAS_DEFAULT_MATH, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetPointerMode(cublasHandle_t, cublasPointerMode_t* mode) {
  return *mode = CUBLAS_POINTER_MODE_HOST, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSgemm(cublasHandle_t handle, cublasOperation_t, cublasOperation_t, int m, int n,
                           int k, const float*, const float*, int, const float*, int, const float*,
                           float*, int) {
  return product("sgemm", m, n, k, stream_of(handle));
}
cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t, cublasOperation_t, int m,
                            int n, int k, const void*, const void*, cudaDataType, int, const void*,
                            cudaDataType, int, const void*, void*, cudaDataType, int,
                            cublasComputeType_t, cublasGemmAlgo_t) {
  return product("gemm", m, n, k, stream_of(handle));
}
cublasStatus_t cublasSgemv(cublasHandle_t handle, cublasOperation_t, int m, int n, const float*,
                           const float*, int, const float*, int, const float*, float*, int) {
  return product("sgemv", m, n, 1, stream_of(handle));
}

// cuBLASLt has opaque structs; torch asks for one algorithm and uses it.
size_t cublasLtGetVersion() { return CUBLAS_VERSION; }
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* made, cublasComputeType_t,
                                        cudaDataType_t) {
  return create(made), CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* made) {
  return create(made), CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* made, cudaDataType, uint64_t,
                                          uint64_t, int64_t) {
  return create(made), CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
    cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int,
    cublasLtMatmulHeuristicResult_t found[], int* count) {
  memset(&found[0], 0, sizeof found[0]);
  return *count = 1, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t, const void*, const void*,
                              cublasLtMatrixLayout_t, const void*, cublasLtMatrixLayout_t,
                              const void*, const void*, cublasLtMatrixLayout_t, void*,
                              cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t*, void*, size_t,
                              cudaStream_t stream) {
  return dry::work("product", "cublasLt", stream), CUBLAS_STATUS_SUCCESS;
}
}

// cuDNN's backend interface: descriptors keep the attributes that were set.

namespace {

struct Descriptor {
  cudnnBackendDescriptorType_t type;
  std::map<int, std::vector<char>> attributes;
  Descriptor* graph = nullptr;  // of an engine configuration that a heuristic found

  template <class T>
  T get(cudnnBackendAttributeName_t name) const {
    T value{};
    auto known = attributes.find(name);
    if (known != attributes.end() && known->second.size() >= sizeof value)
      memcpy(&value, known->second.data(), sizeof value);
    return value;
  }
  const Descriptor* child(cudnnBackendAttributeName_t name) const {
    return get<const Descriptor*>(name);
  }
};

size_t width(cudnnBackendAttributeType_t type) {
  switch (type) {
    case CUDNN_TYPE_HANDLE:
    case CUDNN_TYPE_BACKEND_DESCRIPTOR:
    case CUDNN_TYPE_VOID_PTR:
    case CUDNN_TYPE_INT64:
    case CUDNN_TYPE_DOUBLE: return 8;
    case CUDNN_TYPE_BOOLEAN:
    case CUDNN_TYPE_CHAR: return 1;
    default: return 4;
  }
}

// "bf16 nhwc 8x16x32x32"
std::string tensor(const Descriptor* described) {
  if (described == nullptr) return "?";
  auto numbers = [&](cudnnBackendAttributeName_t name) {
    auto known = described->attributes.find(name);
    std::vector<int64_t> found(known == described->attributes.end() ? 0 : known->second.size() / 8);
    if (!found.empty()) memcpy(found.data(), known->second.data(), 8 * found.size());
    return found;
  };
  auto type = described->get<cudnnDataType_t>(CUDNN_ATTR_TENSOR_DATA_TYPE);
  std::string text = type == CUDNN_DATA_BFLOAT16 ? "bf16" : type == CUDNN_DATA_HALF ? "fp16" : "fp32";
  auto sizes = numbers(CUDNN_ATTR_TENSOR_DIMENSIONS), strides = numbers(CUDNN_ATTR_TENSOR_STRIDES);
  text += strides.size() > 1 && strides[1] == 1 ? " nhwc " : " nchw ";
  for (size_t i = 0; i < sizes.size(); i++) text += (i ? "x" : "") + std::to_string(sizes[i]);
  return text;
}

std::string convolution(const Descriptor* op) {
  auto name = [&](const char* kind, cudnnBackendAttributeName_t x, cudnnBackendAttributeName_t w,
                  cudnnBackendAttributeName_t y) {
    return std::string(kind) + " | " + tensor(op->child(x)) + " | " + tensor(op->child(w)) + " | " +
           tensor(op->child(y));
  };
  switch (op == nullptr ? CUDNN_BACKEND_POINTWISE_DESCRIPTOR : op->type) {
    case CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR:
      return name("forward", CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X,
                  CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W,
                  CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y);
    case CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR:
      return name("input gradient", CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX,
                  CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W,
                  CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY);
    case CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR:
      return name("weight gradient", CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X,
                  CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW,
                  CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY);
    default: return "?";
  }
}

cudnnStatus_t normalisation(const char* name, cudnnHandle_t handle) {
  return dry::work("normalisation", name, stream_of(handle)), CUDNN_STATUS_SUCCESS;
}

}  // namespace

extern "C" {

cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) { return create(handle), CUDNN_STATUS_SUCCESS; }
cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
  return reinterpret_cast<Handle*>(handle)->stream = stream, CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t* stream) {
  return *stream = stream_of(handle), CUDNN_STATUS_SUCCESS;
}
size_t cudnnGetVersion() { return CUDNN_VERSION; }
size_t cudnnGetCudartVersion() { return CUDART_VERSION; }
const char* cudnnGetErrorString(cudnnStatus_t) { return "an error of the dry cuDNN"; }

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type,
                                           cudnnBackendDescriptor_t* made) {
  *made = reinterpret_cast<cudnnBackendDescriptor_t>(new Descriptor{type, {}});
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t descriptor,
                                       cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t count,
                                       const void* values) {
  auto bytes = static_cast<const char*>(values);
  reinterpret_cast<Descriptor*>(descriptor)
      ->attributes[name]
      .assign(bytes, bytes + count * width(type));
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t descriptor) {
  // torch makes a plan where it has none yet for the sizes, after it has tried several.
  if (reinterpret_cast<Descriptor*>(descriptor)->type == CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)
    dry::note("search", "a cuDNN plan");
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t const descriptor,
                                       cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t most,
                                       int64_t* count, void* values) {
  auto asked = reinterpret_cast<Descriptor*>(descriptor);
  auto one = [&](int64_t value) {
    if (count) *count = 1;
    if (values && most > 0) *static_cast<int64_t*>(values) = value;
    return CUDNN_STATUS_SUCCESS;
  };
  if (name == CUDNN_ATTR_ENGINEHEUR_RESULTS) {
    if (count) *count = 1;
    if (values && most > 0)
      (*static_cast<Descriptor**>(values))->graph =
          const_cast<Descriptor*>(asked->child(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH));
    return CUDNN_STATUS_SUCCESS;
  }
  if (name == CUDNN_ATTR_OPERATIONGRAPH_ENGINE_GLOBAL_COUNT) return one(1);
  if (name == CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE) return one(1 << 20);
  const std::vector<char>& known = asked->attributes[name];
  int64_t size = known.size() / width(type);
  if (count) *count = size;
  if (values && size) memcpy(values, known.data(), std::min(size, most) * width(type));
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t plan,
                                  cudnnBackendDescriptor_t) {
  auto config = reinterpret_cast<Descriptor*>(plan)->child(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG);
  const Descriptor* graph = config ? config->graph : nullptr;
  if (config && graph == nullptr)
    if (auto engine = config->child(CUDNN_ATTR_ENGINECFG_ENGINE))
      graph = engine->child(CUDNN_ATTR_ENGINE_OPERATION_GRAPH);
  auto op = graph ? graph->child(CUDNN_ATTR_OPERATIONGRAPH_OPS) : nullptr;
  return dry::work("convolution", convolution(op), stream_of(handle)), CUDNN_STATUS_SUCCESS;
}

// cuDNN's older interface, which torch uses for BatchNorm.

using TD = const cudnnTensorDescriptor_t;
cudnnStatus_t cudnnCreateTensorDescriptor(cudnnTensorDescriptor_t* made) {
  return create(made), CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
    cudnnHandle_t, cudnnBatchNormMode_t, cudnnBatchNormOps_t, TD, TD, TD, TD,
    const cudnnActivationDescriptor_t, size_t* bytes) {
  return *bytes = 1024, CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnGetBatchNormalizationBackwardExWorkspaceSize(
    cudnnHandle_t, cudnnBatchNormMode_t, cudnnBatchNormOps_t, TD, TD, TD, TD, TD, TD,
    const cudnnActivationDescriptor_t, size_t* bytes) {
  return *bytes = 1024, CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnGetBatchNormalizationTrainingExReserveSpaceSize(
    cudnnHandle_t, cudnnBatchNormMode_t, cudnnBatchNormOps_t, const cudnnActivationDescriptor_t, TD,
    size_t* bytes) {
  return *bytes = 1024, CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBatchNormalizationForwardTrainingEx(
    cudnnHandle_t handle, cudnnBatchNormMode_t, cudnnBatchNormOps_t, const void*, const void*, TD,
    const void*, TD, const void*, TD, void*, TD, const void*, const void*, double, void*, void*,
    double, void*, void*, cudnnActivationDescriptor_t, void*, size_t, void*, size_t) {
  return normalisation("forward, training", handle);
}
cudnnStatus_t cudnnBatchNormalizationForwardInference(cudnnHandle_t handle, cudnnBatchNormMode_t,
                                                      const void*, const void*, TD, const void*, TD,
                                                      void*, TD, const void*, const void*,
                                                      const void*, const void*, double) {
  return normalisation("forward, eval", handle);
}
cudnnStatus_t cudnnBatchNormalizationBackwardEx(
    cudnnHandle_t handle, cudnnBatchNormMode_t, cudnnBatchNormOps_t, const void*, const void*,
    const void*, const void*, TD, const void*, TD, const void*, TD, const void*, TD, void*, TD,
    void*, TD, const void*, const void*, void*, void*, double, const void*, const void*,
    cudnnActivationDescriptor_t, void*, size_t, void*, size_t) {
  return normalisation("backward", handle);
}
}
