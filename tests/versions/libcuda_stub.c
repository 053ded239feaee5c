// SPDX-License-Identifier: Apache-2.0
// The driver symbols that vLLM's extension links against: enough to load it, and no device behind it.
enum { CUDA_ERROR_NO_DEVICE = 100 };

int cuGetProcAddress_v2(void) { return CUDA_ERROR_NO_DEVICE; }
int cuPointerGetAttribute(void) { return CUDA_ERROR_NO_DEVICE; }
int cuTensorMapEncodeTiled(void) { return CUDA_ERROR_NO_DEVICE; }
