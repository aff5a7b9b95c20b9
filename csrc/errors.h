// SPDX-License-Identifier: Apache-2.0
// Checks of arguments. torch's stable ABI knows one error, RuntimeError; errors.cpp has the types.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <span>
#include <sstream>
#include <string>
#include <type_traits>

namespace kdfast {

using Sizes = std::span<const int64_t>;

// They become Python's ValueError, TypeError and IndexError.
[[noreturn]] void throw_value_error(const std::string& message);
[[noreturn]] void throw_type_error(const std::string& message);
[[noreturn]] void throw_index_error(const std::string& message);

inline void write(std::ostream& out, Sizes sizes) {
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << ']';
}
template <class T>
void write(std::ostream& out, const T& part) {
  if constexpr (std::is_convertible_v<const T&, Sizes>)
    write(out, Sizes(part));
  else
    out << part;
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (write(out, parts), ...);
  return out.str();
}

// The product of sizes; a ValueError where int64 cannot hold it.
inline int64_t product_of(const char* op, std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(product, size, &product))
      throw_value_error(text(op, ": sizes must have a product below 2^63, got ",
                             Sizes(sizes.begin(), sizes.size())));
  return product;
}

// Whether a * b is `want`, in arithmetic that does not wrap around.
inline bool product_is(int64_t a, int64_t b, int64_t want) {
  int64_t product = 0;
  return !__builtin_mul_overflow(a, b, &product) && product == want;
}

}  // namespace kdfast

// The message is put together only where the check fails.
#define KDFAST_CHECK(condition, error, ...)                 \
  do {                                                      \
    if (!(condition)) [[unlikely]]                          \
      ::kdfast::throw_##error(::kdfast::text(__VA_ARGS__)); \
  } while (false)
#define KDFAST_CHECK_VALUE(condition, ...) KDFAST_CHECK(condition, value_error, __VA_ARGS__)
#define KDFAST_CHECK_INDEX(condition, ...) KDFAST_CHECK(condition, index_error, __VA_ARGS__)
