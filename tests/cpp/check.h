// What the C++ tests share: the first expectation that does not hold ends the program.
#pragma once
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

namespace phyx::test {

[[noreturn]] inline void fail(const char* file, int line, const char* expected, const std::string& message) {
  static std::atomic_flag failed = ATOMIC_FLAG_INIT;
  while (failed.test_and_set()) {  // another thread is about to end the program, and its message is the first one
  }
  std::fflush(stdout);
  std::fprintf(stderr, "%s:%d: expected %s: %s\n", file, line, expected, message.c_str());
  std::fflush(stderr);
  std::_Exit(1);
}

}  // namespace phyx::test

// EXPECT(condition, "what " << came)
#define EXPECT(condition, message)                                               \
  do {                                                                           \
    if (!(condition)) {                                                          \
      std::ostringstream expectation;                                            \
      expectation << message;                                                    \
      ::phyx::test::fail(__FILE__, __LINE__, #condition, expectation.str());     \
    }                                                                            \
  } while (false)
