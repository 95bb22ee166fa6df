// A part of a matrix that one task works on.
#pragma once

#include <cstdint>

namespace pyfused {

// A half-open rectangle. Column begins are multiples of kTileColumns: dropout's counters start there.
struct Tile {
  int64_t row_begin, row_end, column_begin, column_end;
};
inline constexpr int64_t kTileColumns = 128;

}  // namespace pyfused
