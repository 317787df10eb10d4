// torch's lookup of its current CUDA stream, found at run time: linked, it would tie the extension to builds of torch
// with CUDA; declared weak, it stays null, since Python loads torch's libraries out of sight of the linker.
#pragma once
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace sslkernels {

using CurrentStreamLookup = AOTITorchError (*)(int32_t device, void** stream);

// Null where the torch that runs has no CUDA.
inline CurrentStreamLookup current_stream_lookup() {
  static const auto lookup = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<CurrentStreamLookup>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream")
                                                         : nullptr);
  }();
  return lookup;
}

}  // namespace sslkernels
