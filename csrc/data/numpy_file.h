#pragma once
// Arrays as numpy writes them: a .npy file, or a member of an .npz archive that is stored without compression (numpy.savez).
#include <cstdint>
#include <string>
#include <vector>

namespace xlstm::data {

/// Integers in rows (C order). It points into the bytes it was read from.
struct NumpyArray {
  std::string dtype;  ///< numpy's: "|u1", "|i1", "|b1", "<i4", "<i8"
  std::vector<int64_t> shape;
  const unsigned char* data = nullptr;
  int64_t size() const;
  int64_t operator[](int64_t index) const;
};

struct Bytes {
  const unsigned char* data = nullptr;
  size_t size = 0;
};

/// The array of a .npy file's bytes. Throws std::runtime_error that says what is wrong.
NumpyArray read_npy(Bytes bytes);
/// The bytes of <name>.npy in the archive. Throws std::runtime_error that says what is wrong.
Bytes npz_member(Bytes archive, const std::string& name);

}  // namespace xlstm::data
