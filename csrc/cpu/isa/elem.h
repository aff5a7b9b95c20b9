// SPDX-License-Identifier: Apache-2.0
// Element types that the row kernels read; they are passed by tag, since isa/ knows no ATen.
#pragma once

namespace kdfast::cpu {

enum class Elem { f16, bf16, f32, f64 };

}  // namespace kdfast::cpu
