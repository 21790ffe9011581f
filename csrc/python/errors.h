#pragma once

namespace zimage_mxfp8::python {

// Translates the core's exceptions into the classes of zimage_mxfp8.errors.
void register_errors();

}  // namespace zimage_mxfp8::python
