// SPDX-License-Identifier: Apache-2.0
// Part of a wheel only: what gcc's headers take from newer libraries than manylinux_2_28 allows.
#include <new>

// glibc 2.32 says by it that a process has one thread. 0: reference counts are always atomic.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

namespace std {
// libstdc++ of gcc 12 has it.
__attribute__((visibility("hidden"))) void __throw_bad_array_new_length() {
  throw bad_array_new_length();
}
}  // namespace std
