// A part of a matrix that one task works on.
#pragma once

#include <cstdint>

namespace pyfused {

// A half-open rectangle. Column begins are multiples of kTileColumns: dropout's counters start there.
struct Tile {
  int64_t row_begin, row_end, column_begin, column_end;
};
inline constexpr int64_t kTileColumns = 128;

// Packed operands have a leading dimension that is a multiple of this: a loop may read whole vectors past the last
// column.
inline constexpr int64_t kPackedColumns = 64;

}  // namespace pyfused
