// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of all ops, by instruction set.
//
// An op asks kernels() and names no instruction set. A new kernel is a member here and a line where
// its table is filled: isa/row_table.h, or isa/attention_table.h.
//
// Files in isa/ include this too, so it holds plain data only.
#pragma once
#include <cstdint>

#include "cpu/isa/attention_distill.h"
#include "cpu/isa/attention_entropy.h"
#include "cpu/isa/feature_loss.h"
#include "cpu/isa/kd_loss.h"
#include "cpu/isa/layer_norm.h"
#include "cpu/isa/peak.h"
#include "cpu/isa/pruned_attention.h"
#include "cpu/isa/swiglu_norm.h"
#include "cpu/isa/transpose.h"

namespace kdfast::cpu {

enum class Isa { generic, avx2, avx512, avx512_bf16, amx, amx_emulated };

// What the products of an attention call with fp32 sums may be made of: fp32; two bf16 for every
// value, so three products of bf16 in place of one (see isa/split_math.h); or one bf16.
enum class Products { fp32, split, bf16 };

// The attention kernels with sums of type A whose products are of one kind. Arrays are indexed by
// Element; a place is null if no call takes it. Those of float have none for f64. Of the other
// element types, products of bf16 leave out f16, and split products leave out bf16.
template <class A>
struct AttentionKernels {
  static constexpr int kElements = sizeof(A) == sizeof(double) ? 1 : 4;

  AttentionKernel<A> attention[kElements];
  DistillKernel<A> distill[kElements];  // by the student's element type
  EntropyKernel<A> entropy;             // null for split products
};

// The kernels that work on rows [begin, end), for all element types.
struct RowKernels {
  // scratch: kd_loss_scratch(classes) numbers of the accumulator's type.
  void (*kd_loss)(const KdLossArgs& args, int64_t begin, int64_t end, void* scratch);
  void (*feature_loss)(const FeatureLossArgs& args, int64_t begin, int64_t end);
  // Sums of x - shift and of its square over rows [begin, end) of the teacher, for each feature.
  // `sums` (2, features) of the accumulator's type is overwritten; shift (features), or null for 0.
  void (*channel_sums)(const FeatureLossArgs& args, int64_t begin, int64_t end, const void* shift,
                       void* sums);
  void (*layer_norm)(const LayerNormArgs& args, int64_t begin, int64_t end);
  // scratch: (channels) of the accumulator's type.
  void (*swiglu_norm)(const SwigluNormArgs& args, int64_t begin, int64_t end, void* scratch);
  // The same scratch. `sums` (2, channels) of the accumulator's type, the gradients by weight and
  // bias of these rows, is overwritten.
  void (*swiglu_norm_bwd)(const SwigluNormArgs& args, int64_t begin, int64_t end, void* scratch,
                          void* sums);
  // Of strips of kTransposeStrip columns.
  void (*transpose)(const TransposeArgs& args, int64_t begin, int64_t end);
};

// What an instruction set runs.
struct Kernels {
  Isa isa;
  const AttentionKernels<float>* attention[3];  // by Products
  const RowKernels* rows;
  const PeakLoops* peak;
};

// Those of the instruction set in force.
const Kernels& kernels();
// Those of one instruction set, which this CPU must have to run them.
const Kernels& kernels_of(Isa isa);
// Puts an instruction set in force, which this CPU must have.
void use_kernels(Isa isa);

// One table for each file of isa/ that has kernels; kernels.cpp says which of them are used where.
// fp64 is one text for all CPUs.
extern const AttentionKernels<double> attention_f64;
extern const AttentionKernels<float> attention_generic, attention_avx2, attention_avx512;
extern const AttentionKernels<float> attention_avx512_bf16;
extern const AttentionKernels<float> attention_amx, attention_amx_split;
extern const AttentionKernels<float> attention_amx_emulated, attention_amx_emulated_split;
extern const RowKernels rows_generic, rows_avx2, rows_avx512;

}  // namespace kdfast::cpu
