// Opens the checkpoints that it reads the names of, one per line, and says what it makes of each:
// "ok" with the numbers of tensors and MXFP8 layers, "header" or "layers" with an error's sentence,
// which ends with a zero.
#include <zimage_mxfp8/checkpoint.h>
#include <zimage_mxfp8/error.h>

#include <iostream>
#include <optional>
#include <string>

namespace zm = zimage_mxfp8;

int main() {
  std::string path;
  while (std::getline(std::cin, path)) {
    std::optional<zm::Checkpoint> checkpoint;
    try {
      checkpoint.emplace(path);
      const std::size_t layers = checkpoint->layers().size();
      std::cout << "ok " << checkpoint->tensors().size() << " " << layers << '\0';
    } catch (const zm::CheckpointError& error) {
      std::cout << (checkpoint ? "layers " : "header ") << error.what() << '\0';
    }
  }
}
