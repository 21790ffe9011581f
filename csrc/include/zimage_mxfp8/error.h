// Exceptions thrown by the core. The library never prints, exits or aborts.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace zimage_mxfp8 {

// Base of everything that this library throws.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A shape, stride, pointer or option that the operation does not accept.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

// Something that this build or this machine cannot do: a CPU target that was forced but is absent,
// a kernel that was left out of the build, a device without a kernel.
class Unsupported : public Error {
 public:
  using Error::Error;
};

// A CUDA call that failed: no memory, no driver, an earlier fault.
class CudaError : public Error {
 public:
  using Error::Error;
};

// A checkpoint that cannot be read or written, or that breaks a rule of its format.
class CheckpointError : public Error {
 public:
  using Error::Error;
};

// A conversion that would lose more than its bound allows.
class PrecisionLoss : public Error {
 public:
  PrecisionLoss(const std::string& what, double relative_error)
      : Error(what), relative_error_(relative_error) {}
  double relative_error() const noexcept { return relative_error_; }

 private:
  double relative_error_;
};

// A NaN or an infinity in a matrix that is to be quantised.
class NonFiniteValue : public Error {
 public:
  NonFiniteValue(const std::string& what, std::int64_t row, std::int64_t column)
      : Error(what), row_(row), column_(column) {}
  // Position of the first such value in row-major order.
  std::int64_t row() const noexcept { return row_; }
  std::int64_t column() const noexcept { return column_; }

 private:
  std::int64_t row_;
  std::int64_t column_;
};

}  // namespace zimage_mxfp8
