/* A libcuda.so.1 for machines without a GPU, so that kvikio's own code runs in tests on host memory.
 *
 * kvikio loads libcuda before its first transfer and looks these symbols up, even when it will only copy between a
 * file and host memory. Here the driver has a version, every pointer is one that CUDA does not know (so kvikio takes it for host
 * memory), and everything else fails as it does before cuInit. Nothing of this pretends to be a GPU.
 */
#include <stddef.h>

enum { CUDA_SUCCESS = 0, CUDA_ERROR_NOT_INITIALIZED = 3 };

#define FAILS(name) \
  int name(void) { return CUDA_ERROR_NOT_INITIALIZED; }

int cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

int cuGetErrorName(int error, const char **text) {
  *text = error == CUDA_SUCCESS ? "CUDA_SUCCESS" : "CUDA_ERROR_NOT_INITIALIZED";
  return CUDA_SUCCESS;
}

int cuGetErrorString(int error, const char **text) {
  *text = error == CUDA_SUCCESS ? "no error" : "stub libcuda: there is no GPU";
  return CUDA_SUCCESS;
}

FAILS(cuInit)
FAILS(cuPointerGetAttribute)
FAILS(cuPointerGetAttributes)
FAILS(cuMemHostAlloc)
FAILS(cuMemFreeHost)
FAILS(cuMemHostRegister)
FAILS(cuMemHostRegister_v2)
FAILS(cuMemHostUnregister)
FAILS(cuMemcpyHtoDAsync)
FAILS(cuMemcpyHtoDAsync_v2)
FAILS(cuMemcpyDtoHAsync)
FAILS(cuMemcpyDtoHAsync_v2)
FAILS(cuMemcpyAsync)
FAILS(cuMemcpyBatchAsync)
FAILS(cuMemcpyBatchAsync_v2)
FAILS(cuMemGetAddressRange)
FAILS(cuMemGetAddressRange_v2)
FAILS(cuCtxCreate)
FAILS(cuCtxCreate_v2)
FAILS(cuCtxCreate_v3)
FAILS(cuCtxCreate_v4)
FAILS(cuCtxDestroy)
FAILS(cuCtxDestroy_v2)
FAILS(cuCtxPushCurrent)
FAILS(cuCtxPushCurrent_v2)
FAILS(cuCtxPopCurrent)
FAILS(cuCtxPopCurrent_v2)
FAILS(cuCtxGetCurrent)
FAILS(cuCtxGetDevice)
FAILS(cuDeviceGet)
FAILS(cuDeviceGetCount)
FAILS(cuDeviceGetAttribute)
FAILS(cuDevicePrimaryCtxRetain)
FAILS(cuDevicePrimaryCtxRelease)
FAILS(cuDevicePrimaryCtxRelease_v2)
FAILS(cuStreamSynchronize)
FAILS(cuStreamCreate)
FAILS(cuStreamDestroy)
FAILS(cuStreamDestroy_v2)
FAILS(cuEventSynchronize)
FAILS(cuEventCreate)
FAILS(cuEventDestroy)
FAILS(cuEventDestroy_v2)
FAILS(cuEventRecord)
FAILS(cuEventQuery)
FAILS(cuLaunchHostFunc)
