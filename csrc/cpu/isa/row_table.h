// SPDX-License-Identifier: Apache-2.0
// The row kernels of all ops, for whatever instruction set the including file is compiled for.
#pragma once
#include "cpu/isa/feature_loss_rows.h"
#include "cpu/isa/kd_loss_rows.h"
#include "cpu/isa/layer_norm_rows.h"
#include "cpu/isa/swiglu_norm_rows.h"
#include "cpu/isa/transpose_rows.h"
#include "cpu/kernels.h"

namespace kdfast::cpu {
namespace {

constexpr RowKernels kRowKernels = {
    .kd_loss = kd_loss_rows,
    .feature_loss = feature_loss_rows,
    .channel_sums = channel_sums,
    .layer_norm = layer_norm_rows,
    .swiglu_norm = swiglu_norm_rows,
    .swiglu_norm_bwd = swiglu_norm_bwd_rows,
    .transpose = transpose_rows,
};

}  // namespace
}  // namespace kdfast::cpu
