// The way of ema_update_ past the dispatcher, for lists of plain tensors: a thousand of them cost it, and the checks in
// Python before it, far more than the arithmetic does.
#pragma once
#include <pybind11/pybind11.h>

namespace sslkernels {

void bind_ema(pybind11::module_& m);

}  // namespace sslkernels
