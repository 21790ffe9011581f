// Files on disk: one mapped into memory, and one that appears when it is complete. All that differs
// between systems is in file.cpp.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string_view>

namespace zimage_mxfp8::detail {

// A regular file, mapped for reading. Throws CheckpointError.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::string_view bytes() const { return {data_, size_}; }

 private:
  const char* data_ = nullptr;
  std::size_t size_ = 0;
};

// A file under a hidden name beside its target. Throws CheckpointError.
class NewFile {
 public:
  NewFile(const std::filesystem::path& target, bool overwrite);
  // Deletes the file, unless it was published.
  ~NewFile();
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  void write(std::int64_t position, const void* data, std::size_t bytes);

  // Flushes the file and gives it its name.
  void publish();

 private:
  struct Handle;

  std::filesystem::path target_, hidden_;
  bool overwrite_;
  std::unique_ptr<Handle> handle_;
};

}  // namespace zimage_mxfp8::detail
