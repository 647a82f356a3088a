#include <c10/util/Exception.h>
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <new>
#include <system_error>

#include "csrc/core/error.h"
#include "csrc/models/language_model.h"
#include "tests/support/catch.h"
#include "train/command_line.h"

namespace xlstm::train {
namespace {

const std::vector<OptionSpec> kOptions = {{"--seed", "N", "seed of the random numbers"},
                                          {"--max-new-tokens", "N", "tokens to write"},
                                          {"--dry-run", "", "only look"},
                                          {"--prompt", "TEXT", "text to continue"}};

CommandLine parse(std::vector<std::string> arguments, bool takes_settings = true) {
  arguments.insert(arguments.begin(), "program");
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  return parse_command_line(static_cast<int>(arguments.size()), argv.data(), kOptions,
                            takes_settings);
}

std::string parse_error(const std::vector<std::string>& arguments) {
  try {
    parse(arguments);
  } catch (const Error& error) {
    CHECK(error.code == ExitCode::kConfig);
    return error.what();
  }
  return "";
}

struct Outcome {
  int status;
  std::string text;  // standard error
};

// Runs a body with standard error going to a file.
Outcome outcome_of(const std::function<int()>& body) {
  std::string name = (std::filesystem::temp_directory_path() / "xlstm-stderr-XXXXXX").string();
  const int file = mkstemp(name.data());
  REQUIRE(file >= 0);
  std::fflush(stderr);
  const int saved = dup(STDERR_FILENO);
  dup2(file, STDERR_FILENO);
  const int status = run_main("xlstm-test", "use less", body);
  std::fflush(stderr);
  dup2(saved, STDERR_FILENO);
  close(saved);
  std::string text(static_cast<size_t>(lseek(file, 0, SEEK_END)), '\0');
  const ssize_t count = pread(file, text.data(), text.size(), 0);
  close(file);
  std::filesystem::remove(name);
  REQUIRE(count == static_cast<ssize_t>(text.size()));
  return {status, text};
}

}  // namespace

TEST_CASE("command line: positional arguments, options, overrides in any order") {
  const CommandLine line =
      parse({"a.yaml", "--seed", "7", "train.max_steps=5", "--dry-run", "dir/b=c.yaml",
             "--prompt=--x = y", "max_steps=3", "sample.prompts=[\"a=b\"]", "-", ""});
  CHECK(line.positional == std::vector<std::string>{"a.yaml", "dir/b=c.yaml", "-", ""});
  CHECK(line.overrides ==
        std::vector<std::string>{"train.max_steps=5", "max_steps=3", "sample.prompts=[\"a=b\"]"});
  CHECK(line.has("--dry-run"));
  CHECK(line.get("--dry-run", "x") == "");
  CHECK(line.get_int("--seed", 1) == 7);
  CHECK(line.get("--prompt", "") == "--x = y");
  CHECK(!line.has("--max-new-tokens"));
  CHECK(line.get_int("--max-new-tokens", 9) == 9);
  CHECK(line.get("--max-new-tokens", "none") == "none");
  CHECK(parse({"b.txt", "a=1.txt", "c.txt"}, false).positional ==
        std::vector<std::string>{"b.txt", "a=1.txt", "c.txt"});
}

TEST_CASE("command line: values, repetition, end of options") {
  CHECK(parse({"--seed", "-3"}).get_int("--seed", 0) == -3);
  CHECK(parse({"--seed=1", "--seed=2"}).get_int("--seed", 0) == 2);
  CHECK(parse({"--seed", "3e-4"}).get_double("--seed", 0) == 3e-4);
  CHECK(parse({"--prompt="}).has("--prompt"));
  CHECK(parse({"--prompt", ""}).get("--prompt", "x") == "");
  CHECK(parse({"--prompt", "x=1"}).overrides.empty());
  const CommandLine line = parse({"--", "--seed", "a.b=1", "--"});
  CHECK(line.positional == std::vector<std::string>{"--seed", "a.b=1", "--"});
  CHECK(line.options.empty());
  CHECK(parse({}).positional.empty());
  CHECK(parse({"./a=b", "1=2", "=x", "a b=c"}).overrides.empty());
}

TEST_CASE("command line: numbers that grow") {
  CHECK(parse({"--prompt", "1,10,100"}).get_growing("--prompt") ==
        std::vector<int64_t>{1, 10, 100});
  CHECK(parse({"--prompt=7"}).get_growing("--prompt") == std::vector<int64_t>{7});
  CHECK(parse({}).get_growing("--prompt").empty());
  for (const std::string text :
       {"", "0", "1,1", "2,1", "1,", ",1", "1,x", "1 ,2", "-1,2", "1.5", "1,2147483648"})
    CHECK_THROWS_AS(parse({"--prompt", text}).get_growing("--prompt"), Error);
}

TEST_CASE("command line: errors") {
  CHECK(parse_error({"--sed", "1"}) ==
        "command line: unknown option '--sed'; did you mean --seed?");
  CHECK(parse_error({"--max_new_tokens=1"}) ==
        "command line: unknown option '--max_new_tokens'; did you mean --max-new-tokens?");
  CHECK(parse_error({"-x"}) ==
        "command line: unknown option '-x'; options are --seed, --max-new-tokens, --dry-run, "
        "--prompt");
  CHECK(parse_error({"--seed"}) == "command line: --seed needs a value; write --seed=N");
  CHECK(parse_error({"--seed", "--dry-run"}) ==
        "command line: --seed needs a value; write --seed=N");
  CHECK(parse_error({"--dry-run=yes"}) ==
        "command line: --dry-run takes no value, got '--dry-run=yes'");
  const auto number_error = [](const std::string& text, bool integer) -> std::string {
    const CommandLine line = parse({"--seed", text});
    try {
      integer ? static_cast<void>(line.get_int("--seed", 0))
              : static_cast<void>(line.get_double("--seed", 0));
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  const auto range_error = [](const std::string& text) -> std::string {
    try {
      parse({"--seed", text}).get_int("--seed", 0, 1);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  CHECK(range_error("2147483647") == "");
  CHECK(range_error("0") == "command line: --seed must be at least 1, got 0");
  CHECK(range_error("9223372036854775807") ==
        "command line: --seed must be at most 2147483647, got 9223372036854775807");
  for (const std::string text : {"abc", "1.5", "", "1 ", "0x1", "99999999999999999999"}) {
    CHECK(number_error(text, true) ==
          "command line: --seed: got '" + text + "', expected an integer");
  }
  for (const std::string text : {"abc", "", "nan", "inf", "1e999", "0,5"}) {
    CHECK(number_error(text, false) ==
          "command line: --seed: got '" + text + "', expected a number");
  }
}

TEST_CASE("command line: format_options aligns") {
  CHECK(format_options(kOptions) ==
        "  --seed N             seed of the random numbers\n"
        "  --max-new-tokens N   tokens to write\n"
        "  --dry-run            only look\n"
        "  --prompt TEXT        text to continue\n");
}

TEST_CASE("run_main turns exceptions into one line and the documented exit status") {
  const auto check = [](const std::function<int()>& body, int status, const std::string& text) {
    const Outcome outcome = outcome_of(body);
    CHECK(outcome.status == status);
    CHECK(outcome.text == text);
  };
  check([] { return 0; }, 0, "");
  check([] { return 75; }, 75, "");
  const std::string head = "xlstm-test: error: ";
  check([]() -> int { throw Error(ExitCode::kData, "a.bin: cut\nshort\n"); }, 3,
        head + "a.bin: cut short\n");
  check([]() -> int { throw Error(ExitCode::kPreempted, "saved"); }, 75, head + "saved\n");
  const std::string advice = "; use less\n";
  check([]() -> int { throw std::bad_alloc(); }, 7, head + "out of memory" + advice);
  check(
      []() -> int {
        TORCH_CHECK(false,
                    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes");
        return 0;
      },
      7,
      head +
          "out of memory ([enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 "
          "bytes)" +
          advice);
  check(
      []() -> int {
        TORCH_CHECK(false, "q: expected 4 axes, got 3\nsecond line");
        return 0;
      },
      1, head + "q: expected 4 axes, got 3\n");
  check(
      []() -> int {
        TORCH_CHECK_VALUE(false, "model.max_positions: 9 tokens\nsecond line");
        return 0;
      },
      2, head + "model.max_positions: 9 tokens\n");
  check(
      []() -> int {
        models::ModelOptions options;
        options.num_heads = 3;
        models::make_language_model(options, at::kMeta);
        return 0;
      },
      2, head + "num_heads: expected a divisor of the mLSTM's inner width 256, got 3\n");
  check(
      []() -> int {
        throw c10::OutOfMemoryError({__func__, __FILE__, 1}, "CUDA out of memory. Tried 2 GiB");
      },
      7, head + "out of memory (CUDA out of memory. Tried 2 GiB)" + advice);
  check([]() -> int { throw std::system_error(ENOSPC, std::generic_category(), "runs/x"); }, 4,
        head + "runs/x: No space left on device\n");
  check([]() -> int { throw std::system_error(EAGAIN, std::generic_category(), "thread"); }, 1,
        head + "thread: Resource temporarily unavailable\n");
  check([]() -> int { throw std::runtime_error("odd"); }, 1, head + "odd\n");
  check([]() -> int { throw 5; }, 1, head + "unknown exception\n");
  CHECK(outcome_of([]() -> int {
          return static_cast<int>(std::filesystem::file_size("/nonexistent/x"));
        }).status == 4);
}

TEST_CASE("no memory, by class or by what torch says") {
  const auto says = [](const std::string& text) {
    return is_out_of_memory(c10::Error(text, nullptr));
  };
  CHECK(is_out_of_memory(std::bad_alloc()));
  CHECK(says("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"));
  CHECK(says("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"));
  CHECK(says("CUDA error: out of memory"));
  CHECK(!says("q: expected 4 axes, got 3"));
  CHECK(!is_out_of_memory(std::runtime_error("out of memory")));
}

TEST_CASE("run_main survives a closed pipe") {
  const Outcome outcome = outcome_of([] {
    int ends[2];
    if (pipe(ends) != 0) return 1;
    close(ends[0]);
    const ssize_t written = write(ends[1], "x", 1);
    const int reason = errno;
    close(ends[1]);
    return written < 0 && reason == EPIPE ? 0 : 1;
  });
  CHECK(outcome.status == 0);
}

}  // namespace xlstm::train
