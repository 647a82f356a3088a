// Files, bases and overrides.
#include <clocale>

#include "csrc/config/text.h"
#include "tests/config/support.h"
#include "tests/support/catch.h"

namespace xlstm::config {
namespace {

std::string load_message(const std::string& path, const std::vector<std::string>& overrides = {}) {
  return message_of([&] { load_config(path, overrides); });
}

}  // namespace

TEST_CASE("an empty map is the defaults") {
  CHECK(differences(parse_config("{}", "f"), Config()).empty());
}

TEST_CASE("bases come first, later wins, paths are relative to the file") {
  const TemporaryFolder folder;
  folder.write("model/small.yaml",
               "model: {num_blocks: 2, num_heads: 2, slstm_at: [1]}\nrun: {seed: 1}\n");
  folder.write("model/wide.yaml",
               "base: small.yaml\nmodel: {embedding_dim: 256}\nrun: {seed: 2}\n");
  folder.write("recipe.yaml",
               "run: {seed: 3}\noptim: {learning_rate: 3e-3}\nmodel: {num_heads: 8}\n");
  const std::string path = folder.write(
      "runs/a b ü.yaml",
      "run: {name: x}\nbase: [../model/wide.yaml, ../recipe.yaml]\nmodel: {slstm_at: []}\n");
  const Config config = load_config(path, {"model.num_blocks=5", "model.num_blocks=6"});
  CHECK(config.model.num_blocks == 6);
  CHECK(config.model.embedding_dim == 256);
  CHECK(config.model.num_heads == 8);
  CHECK(config.model.slstm_at.empty());
  CHECK(config.run.seed == 3);
  CHECK(config.run.name == "x");
  CHECK(config.optim.learning_rate == 3e-3);
  CHECK(config.origin.at("run.seed") == folder.path("runs/../recipe.yaml") + ":1");
  CHECK(config.origin.at("model.num_blocks") == "override 'model.num_blocks=6'");
  CHECK(config.origin.count("run.device") == 0);
}

TEST_CASE("bases that cannot be loaded name the place of the base") {
  const TemporaryFolder folder;
  const std::string self = folder.write("self.yaml", "run: {seed: 1}\nbase: self.yaml\n");
  CHECK(load_message(self) == self + ":2: base: '" + folder.path("self.yaml") +
                                  "' is based on itself; remove one of the bases");
  folder.write("one.yaml", "base: sub/../two.yaml\n");
  folder.write("sub/x.yaml", "{}");
  const std::string two = folder.write("two.yaml", "base:\n  - one.yaml\n");
  CHECK(load_message(two).find("one.yaml:1: base: ") != std::string::npos);
  CHECK(load_message(two).find("is based on itself") != std::string::npos);
  const std::string missing = folder.write("missing.yaml", "base: on.yaml\n");
  CHECK(load_message(missing) == missing + ":1: base: no such file '" + folder.path("on.yaml") +
                                     "'; did you mean " + folder.path("one.yaml") + "?");
  const std::string wrong = folder.write("wrong.yaml", "base: [one.yaml, []]\n");
  CHECK(load_message(folder.write("w.yaml", "run: {seed: 1}\nbase: {a: b}\n")) ==
        folder.path("w.yaml") +
            ":2: base: expected a path or a list of paths, relative to this file");
  // An error inside a base names that file.
  folder.write("bad.yaml", "\n\nrun: {sed: 1}\n");
  CHECK(load_message(folder.write("user.yaml", "base: bad.yaml\n")) ==
        folder.path("bad.yaml") + ":3: run.sed: unknown key; did you mean run.seed?");
}

TEST_CASE("a diamond of bases is fine, a lattice is refused") {
  const TemporaryFolder folder;
  folder.write("l0.yaml", "run: {seed: 9}\n");
  for (int i = 1; i <= 20; ++i) {
    const std::string below = "l" + std::to_string(i - 1) + ".yaml";
    folder.write("l" + std::to_string(i) + ".yaml", "base: [" + below + ", " + below + "]\n");
  }
  CHECK(load_config(folder.path("l2.yaml")).run.seed == 9);
  CHECK(load_message(folder.path("l20.yaml")).find("more than 100 files") != std::string::npos);
}

TEST_CASE("files that are not there or not files") {
  const TemporaryFolder folder;
  folder.write("quickstart.yaml", "{}");
  CHECK(load_message(folder.path("quikstart.yaml")) ==
        "configuration: no such file '" + folder.path("quikstart.yaml").substr(0, 60) +
            (folder.path("quikstart.yaml").size() > 60 ? "..." : "") + "'; did you mean " +
            folder.path("quickstart.yaml") + "?");
  CHECK(load_message(folder.path("")) ==
        "configuration: " + folder.path("") + ": a folder, expected a file");
  CHECK(load_message("/proc/self/mem") ==
        "configuration: /proc/self/mem: cannot read: Input/output error");
  CHECK(load_message("/dev/zero").find("larger than 1 MiB") != std::string::npos);
}

TEST_CASE("overrides") {
  const TemporaryFolder folder;
  const std::string path = folder.write("a.yaml", "run: {name: x}\n");
  const auto with = [&](const std::string& text) { return load_config(path, {text}); };
  SECTION("values are YAML, text is literal unless quoted") {
    CHECK(with("train.max_steps=100").train.max_steps == 100);
    CHECK(with("optim.learning_rate=3e-4").optim.learning_rate == 3e-4);
    CHECK(with("model.slstm_at=[0, 2]").model.slstm_at == std::vector<int64_t>{0, 2});
    CHECK(with("model.slstm_at=[]").model.slstm_at.empty());
    CHECK(with("model.mlstm.normalize=false").model.mlstm.normalize == false);
    CHECK(with("data.text=*.txt").data.text == "*.txt");
    CHECK(with("data.text=a=b: #c [x").data.text == "a=b: #c [x");
    CHECK(with("data.text=").data.text.empty());
    CHECK(with("data.text='it''s'").data.text == "it's");
    CHECK(with("data.text=\"a\\tb\"").data.text == "a\tb");
    CHECK(with("data.text=null").data.text == "null");
    CHECK(with("sample.prompts=[\"def \", import]").sample.prompts ==
          std::vector<std::string>{"def ", "import"});
    const Config config = with("data.train=[{path: a, weight: 2}, {path: b}]");
    REQUIRE(config.data.train.size() == 2);
    CHECK(config.data.train[0].weight == 2);
    CHECK(config.data.train[1].path == "b");
  }
  SECTION("errors name the override") {
    const std::vector<std::pair<std::string, std::string>> cases = {
        {"train.max_stps=5", "train.max_stps: unknown key; did you mean train.max_steps?"},
        {"max_steps=5", "max_steps: unknown key; did you mean train.max_steps?"},
        {"train=5", "train: is a section; override one setting of it, as in train.key=value"},
        {"base=b.yaml", "base: works inside files only; load the other file instead"},
        {"nothing", "expected key.sub=value, such as train.max_steps=100"},
        {"=5", "expected key.sub=value, such as train.max_steps=100"},
        {"train.max_steps=",
         "train.max_steps: got no value, expected integer 0..1000000000000; give a value or remove "
         "the line"},
        {"train.max_steps=x", "train.max_steps: got 'x', expected integer 0..1000000000000"},
        {"model.slstm_at=[1,", "not valid YAML (end of sequence flow not found)"},
        {"model.slstm_at=[9]",
         "model.slstm_at: position 9 does not exist, expected 0..3 (model.num_blocks is 4)"},
        {"optim.schedule=Cosine",
         "optim.schedule: got 'Cosine', expected cosine | linear | constant | wsd; did you "
         "mean cosine?"},
    };
    for (const auto& [text, message] : cases) {
      CHECK(load_message(path, {text}) == "override '" + text + "': " + message);
    }
    CHECK(load_message(path, {"data.text=\xff"}).find("not UTF-8 text") != std::string::npos);
  }
}

TEST_CASE("numbers do not depend on the locale") {
  const char* found = nullptr;
  for (const char* name : {"de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "de_DE"}) {
    if (found == nullptr) found = std::setlocale(LC_ALL, name);
  }
  // Also without such a locale on the machine the conversions below must hold.
  const Config config = parse_config("optim: {learning_rate: 1.5e-3, eps: 1e-10}", "f");
  CHECK(config.optim.learning_rate == 1.5e-3);
  CHECK(print_config(config).find("learning_rate: 0.0015 ") != std::string::npos);
  CHECK(print_config(config).find("  eps: 1.0e-10 ") != std::string::npos);
  std::setlocale(LC_ALL, "C");
}

TEST_CASE("conversion of numbers") {
  CHECK(format_double(1e-5) == "1.0e-05");
  CHECK(format_double(0.1) == "0.1");
  CHECK(format_double(1) == "1.0");
  CHECK(format_double(-2.5e300) == "-2.5e+300");
  CHECK(format_double(5e-324) == "5.0e-324");
  CHECK(parse_double("5e-324") == 5e-324);
  CHECK(parse_double("1.7976931348623157e308") == 1.7976931348623157e308);
  CHECK(!parse_double("1e309"));
  CHECK(!parse_double(""));
  CHECK(!parse_double("+-1"));
  CHECK(parse_int("-9223372036854775808") == std::numeric_limits<int64_t>::min());
  CHECK(!parse_int("+-1"));
  CHECK(!parse_int("--1"));
  CHECK(!parse_int("-"));
  CHECK(!parse_int(" 1"));
  CHECK(parse_int("-0") == 0);
}

}  // namespace xlstm::config
