// What the test programs print and return.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

namespace pyfused {

inline int failures = 0;

inline void check(bool holds, const std::string& what) {
  std::printf("%-72s %s\n", what.c_str(), holds ? "ok" : "FAILED");
  failures += !holds;
}

// What main returns.
inline int exit_status() { return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE; }

}  // namespace pyfused
