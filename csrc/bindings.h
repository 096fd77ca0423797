// What the two Python modules have in common: addresses come in a list, in the order in which the Python side
// names them, and cells by their names.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

namespace sire_fast {

using Addresses = std::vector<uintptr_t>;

// Hands out addresses one after the other.
class Reader {
 public:
  explicit Reader(const Addresses& addresses) : next_(addresses.begin()) {}
  template <class... P>
  void operator()(P*&... p) {
    ((p = reinterpret_cast<P*>(*next_++)), ...);
  }

 private:
  Addresses::const_iterator next_;
};

constexpr const char* kCellNames[] = {"rnn_tanh", "rnn_relu", "gru", "lstm"};

inline int cell_number(const std::string& name) {
  int n = 0;
  for (const char* known : kCellNames) {
    if (name == known) return n;
    ++n;
  }
  throw pybind11::value_error("cell: got " + name);
}

}  // namespace sire_fast
