// Calls that only have to succeed. No CUDA header is included, so that no signature is needed.
#define SUCCEED(name) \
  int name(...) { return 0; }

extern "C" {
// The runtime.
SUCCEED(__cudaRegisterFatBinaryEnd)
SUCCEED(__cudaRegisterVar)
SUCCEED(__cudaUnregisterFatBinary)
SUCCEED(cudaDeviceEnablePeerAccess)
SUCCEED(cudaEventDestroy)
SUCCEED(cudaFuncSetAttribute)
SUCCEED(cudaGraphDestroy)
SUCCEED(cudaGraphExecDestroy)
SUCCEED(cudaHostRegister)
SUCCEED(cudaHostUnregister)
SUCCEED(cudaMemcpyToSymbol)
SUCCEED(cudaProfilerStart)
SUCCEED(cudaProfilerStop)
SUCCEED(cudaSetDevice)
SUCCEED(cudaStreamAddCallback)
SUCCEED(cudaStreamDestroy)
SUCCEED(cudaStreamUpdateCaptureDependencies)
// The driver.
SUCCEED(cuCtxPushCurrent_v2)
SUCCEED(cuCtxSetCurrent)
SUCCEED(cuCtxSetLimit)
SUCCEED(cuDevicePrimaryCtxRelease_v2)
SUCCEED(cuFuncSetAttribute)
SUCCEED(cuFuncSetCacheConfig)
SUCCEED(cuInit)
SUCCEED(cuModuleUnload)
SUCCEED(cuTensorMapEncodeTiled)
// cuBLAS.
SUCCEED(cublasDestroy_v2)
SUCCEED(cublasSetMathMode)
SUCCEED(cublasSetPointerMode_v2)
SUCCEED(cublasSetWorkspace_v2)
SUCCEED(cublasLtMatmulDescDestroy)
SUCCEED(cublasLtMatmulDescSetAttribute)
SUCCEED(cublasLtMatmulPreferenceDestroy)
SUCCEED(cublasLtMatmulPreferenceSetAttribute)
SUCCEED(cublasLtMatrixLayoutDestroy)
SUCCEED(cublasLtMatrixLayoutSetAttribute)
// cuDNN. A descriptor is never freed: plans refer to one another.
SUCCEED(cudnnBackendDestroyDescriptor)
SUCCEED(cudnnBackendInitialize)
SUCCEED(cudnnDestroyTensorDescriptor)
SUCCEED(cudnnSetTensorNdDescriptor)
}
