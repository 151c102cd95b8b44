/* What the emulated devices say of themselves. */
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tests/cuda_double/double_impl.h"

using namespace cuda_double;

static thread_local int current_device;

static cudaError_t availability() {
  if (settings().driver == 0 || settings().devices == 0) return cudaErrorNoDevice;
  return settings().driver < CUDART_VERSION / 1000 * 1000 ? cudaErrorInsufficientDriver : cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) {
  *count = availability() == cudaSuccess ? settings().devices : 0;
  return result(availability());
}

cudaError_t cudaSetDevice(int device) {
  if (availability() != cudaSuccess) return result(availability());
  if (device < 0 || device >= settings().devices) return result(cudaErrorInvalidDevice);
  current_device = device;
  return result(cudaSuccess);
}

cudaError_t cudaGetDevice(int *device) {
  *device = current_device;
  return result(availability());
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device) {
  if (availability() != cudaSuccess) return result(availability());
  if (device < 0 || device >= settings().devices) return result(cudaErrorInvalidDevice);
  memset(properties, 0, sizeof *properties);
  snprintf(properties->name, sizeof properties->name, "Emulated CUDA device");
  properties->totalGlobalMem = settings().memory;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = 227 << 10;
  properties->sharedMemPerMultiprocessor = 228 << 10;
  properties->regsPerBlock = 65536;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  for (int i = 0; i < 3; i++) properties->maxThreadsDim[i] = i < 2 ? 1024 : 64;
  for (int i = 0; i < 3; i++) properties->maxGridSize[i] = i < 1 ? 2147483647 : 65535;
  properties->major = settings().capability / 10;
  properties->minor = settings().capability % 10;
  properties->multiProcessorCount = 8;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->l2CacheSize = 1 << 20;
  properties->pciBusID = (int)strtol(settings().bus.c_str(), nullptr, 0) + device;
  memcpy(properties->uuid.bytes, &properties->pciBusID, sizeof properties->pciBusID);
  return result(cudaSuccess);
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp properties;
  cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error != cudaSuccess) return error;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = properties.maxThreadsPerBlock;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = (int)properties.sharedMemPerBlock;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = properties.multiProcessorCount;
      break;
    case cudaDevAttrL2CacheSize:
      *value = properties.l2CacheSize;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = properties.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = properties.minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = (int)properties.sharedMemPerBlockOptin;
      break;
    default:
      return result(cudaErrorInvalidValue);
  }
  return result(cudaSuccess);
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int capacity, int device) {
  cudaDeviceProp properties;
  cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error == cudaSuccess) snprintf(text, (size_t)capacity, "0000:%02X:00.0", properties.pciBusID);
  return error;
}

cudaError_t cudaDriverGetVersion(int *version) {
  *version = settings().driver;
  return result(cudaSuccess);
}

cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = CUDART_VERSION;
  return result(cudaSuccess);
}
