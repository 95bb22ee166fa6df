// How memory that the host makes for the loops is laid out.
#pragma once

#include <cstdint>

namespace pyfused {

// Packed operands have a leading dimension that is a multiple of this: a loop may read whole vectors past the last
// column.
inline constexpr int64_t kPackedColumns = 64;

}  // namespace pyfused
