#include "checkpoint/file.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>
#include <system_error>

#include "zimage_mxfp8/error.h"

#ifdef _WIN32
#ifndef NOMINMAX
#define NOMINMAX
#endif
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace zimage_mxfp8::detail {
namespace {

constexpr std::size_t kLargestWrite = std::size_t{1} << 30;  // systems have limits for one call

[[noreturn]] void fail_to_read(const std::filesystem::path& path, int error) {
  throw CheckpointError(path.u8string() +
                        " cannot be read: " + std::system_category().message(error) +
                        "; check the path and its permissions");
}

[[noreturn]] void fail_to_write(const std::filesystem::path& path, int error) {
  throw CheckpointError(path.u8string() +
                        " cannot be written: " + std::system_category().message(error) +
                        "; check the folder, its permissions and its free space");
}

[[noreturn]] void refuse_existing(const std::filesystem::path& target) {
  throw CheckpointError("the output " + target.u8string() +
                        " exists; name another file, or allow to overwrite it");
}

[[noreturn]] void refuse_irregular(const std::filesystem::path& path) {
  throw CheckpointError(path.u8string() + " is not a regular file; name a file");
}

std::string process_id();

// A name for a new file in the folder of another, which no other thread gets.
std::filesystem::path hidden_name(const std::filesystem::path& target) {
  static std::atomic<unsigned> count{0};
  const std::string number = process_id() + "-" + std::to_string(count++);
  return target.parent_path() / (".zimage-mxfp8-" + number + ".partial");
}

// The file that a path names: a link stays a link, and its target is replaced.
std::filesystem::path without_links(const std::filesystem::path& path) {
  constexpr int kMostLinks = 40;  // Linux follows as many
  std::filesystem::path file = path;
  std::error_code failed;
  for (int i = 0; i < kMostLinks && std::filesystem::is_symlink(file, failed); ++i) {
    file = file.parent_path() / std::filesystem::read_symlink(file, failed);  // or absolute
    if (failed) return path;
  }
  return file;
}

}  // namespace

#ifdef _WIN32

namespace {

int last_error() { return static_cast<int>(GetLastError()); }

std::string process_id() { return std::to_string(GetCurrentProcessId()); }

// Closes a handle at the end of a scope.
struct Closer {
  HANDLE handle;
  ~Closer() { CloseHandle(handle); }
};

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) {
  const HANDLE file = CreateFileW(path.c_str(), GENERIC_READ, FILE_SHARE_READ, nullptr,
                                  OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, nullptr);
  if (file == INVALID_HANDLE_VALUE) fail_to_read(path, last_error());
  const Closer file_closer{file};
  LARGE_INTEGER size;
  if (GetFileType(file) != FILE_TYPE_DISK) refuse_irregular(path);
  if (!GetFileSizeEx(file, &size)) fail_to_read(path, last_error());
  size_ = static_cast<std::size_t>(size.QuadPart);
  if (size_ == 0) return;
  const HANDLE mapping = CreateFileMappingW(file, nullptr, PAGE_READONLY, 0, 0, nullptr);
  if (!mapping) fail_to_read(path, last_error());
  const Closer mapping_closer{mapping};
  data_ = static_cast<const char*>(MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0));
  if (!data_) fail_to_read(path, last_error());
}

MappedFile::~MappedFile() {
  if (data_) UnmapViewOfFile(data_);
}

struct NewFile::Handle {
  HANDLE file;
};

NewFile::NewFile(const std::filesystem::path& target, bool overwrite)
    : target_(without_links(target)), overwrite_(overwrite) {
  std::error_code ignored;
  if (!overwrite && std::filesystem::exists(target_, ignored)) refuse_existing(target_);
  for (;;) {
    hidden_ = hidden_name(target_);
    const HANDLE file = CreateFileW(hidden_.c_str(), GENERIC_WRITE, 0, nullptr, CREATE_NEW,
                                    FILE_ATTRIBUTE_NORMAL, nullptr);
    if (file != INVALID_HANDLE_VALUE) {
      handle_.reset(new Handle{file});
      return;
    }
    if (last_error() != ERROR_FILE_EXISTS) fail_to_write(target_, last_error());
  }
}

NewFile::~NewFile() {
  if (!handle_) return;
  CloseHandle(handle_->file);
  DeleteFileW(hidden_.c_str());
}

void NewFile::write(std::int64_t position, const void* data, std::size_t bytes) {
  const char* begin = static_cast<const char*>(data);
  while (bytes > 0) {
    OVERLAPPED where{};
    where.Offset = static_cast<DWORD>(position & 0xFFFFFFFF);
    where.OffsetHigh = static_cast<DWORD>(position >> 32);
    DWORD written = 0;
    if (!WriteFile(handle_->file, begin, static_cast<DWORD>(std::min(bytes, kLargestWrite)),
                   &written, &where)) {
      fail_to_write(target_, last_error());
    }
    begin += written;
    bytes -= written;
    position += written;
  }
}

void NewFile::publish() {
  if (!FlushFileBuffers(handle_->file)) fail_to_write(target_, last_error());
  CloseHandle(handle_->file);  // an open file cannot be renamed
  handle_.reset();
  const DWORD flags = MOVEFILE_WRITE_THROUGH | (overwrite_ ? MOVEFILE_REPLACE_EXISTING : 0);
  if (MoveFileExW(hidden_.c_str(), target_.c_str(), flags)) return;
  const int error = last_error();
  DeleteFileW(hidden_.c_str());
  if (error == ERROR_ALREADY_EXISTS || error == ERROR_FILE_EXISTS) refuse_existing(target_);
  fail_to_write(target_, error);
}

#else

namespace {

std::string process_id() { return std::to_string(getpid()); }

// Closes a descriptor at the end of a scope.
struct Closer {
  int descriptor;
  ~Closer() { close(descriptor); }
};

void flush_folder(const std::filesystem::path& folder) {
  const int descriptor = open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return;
  const Closer closer{descriptor};
  fsync(descriptor);  // the file is complete even if this fails
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) {
  // Opening a pipe would otherwise wait for its writer.
  const int descriptor = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
  if (descriptor < 0) fail_to_read(path, errno);
  const Closer closer{descriptor};
  struct stat status;
  if (fstat(descriptor, &status) != 0) fail_to_read(path, errno);
  if (!S_ISREG(status.st_mode)) refuse_irregular(path);
  size_ = static_cast<std::size_t>(status.st_size);
  if (size_ == 0) return;
  void* data = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor, 0);
  if (data == MAP_FAILED) fail_to_read(path, errno);
  data_ = static_cast<const char*>(data);
}

MappedFile::~MappedFile() {
  if (data_) munmap(const_cast<char*>(data_), size_);
}

struct NewFile::Handle {
  int descriptor;
};

NewFile::NewFile(const std::filesystem::path& target, bool overwrite)
    : target_(without_links(target)), overwrite_(overwrite) {
  struct stat status;
  if (!overwrite && lstat(target_.c_str(), &status) == 0) refuse_existing(target_);
  for (;;) {
    hidden_ = hidden_name(target_);
    const int descriptor = open(hidden_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (descriptor >= 0) {
      handle_.reset(new Handle{descriptor});
      return;
    }
    if (errno != EEXIST) fail_to_write(target_, errno);  // else a crash left it
  }
}

NewFile::~NewFile() {
  if (!handle_) return;
  close(handle_->descriptor);
  unlink(hidden_.c_str());
}

void NewFile::write(std::int64_t position, const void* data, std::size_t bytes) {
  const char* begin = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written =
        pwrite(handle_->descriptor, begin, std::min(bytes, kLargestWrite), position);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail_to_write(target_, errno);
    begin += written;
    bytes -= static_cast<std::size_t>(written);
    position += written;
  }
}

void NewFile::publish() {
  if (fsync(handle_->descriptor) != 0) fail_to_write(target_, errno);
  // A link, unlike a new name, never replaces a file. Filesystems without links are rare.
  const bool linked = !overwrite_ && link(hidden_.c_str(), target_.c_str()) == 0;
  if (linked) {
    unlink(hidden_.c_str());
  } else {
    struct stat status;
    if (!overwrite_ && lstat(target_.c_str(), &status) == 0) refuse_existing(target_);
    if (rename(hidden_.c_str(), target_.c_str()) != 0) fail_to_write(target_, errno);
  }
  close(handle_->descriptor);
  handle_.reset();
  flush_folder(target_.parent_path());
}

#endif

}  // namespace zimage_mxfp8::detail
