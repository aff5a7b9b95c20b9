// SPDX-License-Identifier: Apache-2.0
// Included in front of every file of a wheel (KDFAST_PORTABLE): names that this machine's glibc has
// in newer versions than manylinux_2_28 allows, in those that every x86-64 glibc has.
#pragma once
__asm__(".symver exp, exp@GLIBC_2.2.5");
__asm__(".symver log, log@GLIBC_2.2.5");
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");

// Streams are compiled in: those of a newer libstdc++ have members that older ones lack.
#include <bits/c++config.h>
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0
