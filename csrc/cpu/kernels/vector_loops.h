// Loops over vectors whose last one has fewer elements than lanes.
#pragma once

#include "simd.h"

namespace pyfused::PYFUSED_ISA {

template <class Acc, class T>
inline Vector<Acc> load_some(const T* p, int count) {
  return count == kWidth<Acc> ? load(p) : load_first(p, count);
}
template <class Acc, class T>
inline void store_some(T* p, Vector<Acc> v, int count) {
  count == kWidth<Acc> ? store(p, v) : store_first(p, v, count);
}

// run(column, count) for vectors of columns [begin, end), the last with fewer than a vector's lanes.
template <class Acc, class F>
inline __attribute__((always_inline)) void for_vectors(int64_t begin, int64_t end, const F& run) {
  int64_t k = begin;
  for (; k + kWidth<Acc> <= end; k += kWidth<Acc>) run(k, kWidth<Acc>);
  if (k < end) run(k, static_cast<int>(end - k));
}

}  // namespace pyfused::PYFUSED_ISA
