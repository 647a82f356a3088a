// For tests in other languages: `config_tool schema`, `config_tool help`, `config_tool print FILE
// [key.sub=value ...]`. Errors go to standard error as one line, exit status as of the programs.
#include <cstdio>
#include <string>
#include <vector>

#include "csrc/config/config.h"
#include "csrc/core/error.h"

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const std::string command = arguments.empty() ? "" : arguments[0];
  try {
    std::string out;
    if (command == "schema") {
      out = xlstm::config::config_schema_json();
    } else if (command == "help") {
      out = xlstm::config::config_help();
    } else if (command == "print" && arguments.size() >= 2) {
      out = xlstm::config::print_config(xlstm::config::load_config(
          arguments[1], std::vector<std::string>(arguments.begin() + 2, arguments.end())));
    } else {
      std::fputs("usage: config_tool schema | help | print FILE [key.sub=value ...]\n", stderr);
      return 2;
    }
    std::fwrite(out.data(), 1, out.size(), stdout);
  } catch (const xlstm::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return static_cast<int>(error.code);
  }
  return 0;
}
