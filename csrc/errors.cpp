// SPDX-License-Identifier: Apache-2.0
#include "errors.h"

#include <pybind11/pybind11.h>

namespace kdfast {

// torch calls ops through pybind11, which turns these classes, whichever of its versions threw
// them, into Python's.
void throw_value_error(const std::string& message) { throw pybind11::value_error(message); }
void throw_type_error(const std::string& message) { throw pybind11::type_error(message); }
void throw_index_error(const std::string& message) { throw pybind11::index_error(message); }

}  // namespace kdfast
