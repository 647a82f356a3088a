// print_config and parse_config are inverse to each other.
#include <cmath>
#include <random>

#include "tests/config/support.h"
#include "tests/support/catch.h"

namespace xlstm::config {
namespace {

const std::vector<std::string> kNastyTexts = {"plain",
                                              "a b",
                                              " lead",
                                              "trail ",
                                              "null",
                                              "true",
                                              "No",
                                              "~",
                                              "1e5",
                                              "010",
                                              "0x1F",
                                              "-",
                                              "- a",
                                              "a: b",
                                              "a #b",
                                              "#x",
                                              "'",
                                              "\"",
                                              "it's \"x\"",
                                              "back\\slash",
                                              "*.txt",
                                              "&a",
                                              "!tag",
                                              "|",
                                              ">",
                                              "%",
                                              "@x",
                                              "`",
                                              "{a: b}",
                                              "[1, 2]",
                                              "a,b",
                                              "?",
                                              "? x",
                                              "line\nb",
                                              "tab\tb",
                                              "cr\rb",
                                              "\n",
                                              "\x01",
                                              "\x1b[0m",
                                              "\x7f",
                                              "größe",
                                              "日本語",
                                              "😀",
                                              "\xc2\x85",
                                              "\xe2\x80\xa8",
                                              "\xef\xbb\xbfx",
                                              "\xc2\x9f",
                                              "\xe2\x80\xa9",
                                              "\xef\xbf\xbf",
                                              "\xc2\xa0",
                                              "---",
                                              "...",
                                              "def f(x):\n    return x\n",
                                              "<<",
                                              "=",
                                              "1_000",
                                              ".inf",
                                              "12:30:45",
                                              "2024-01-01",
                                              "/a/b-c_d.yaml",
                                              "~/data",
                                              "C:\\x",
                                              "on"};

class RandomConfig {
 public:
  explicit RandomConfig(unsigned seed) : random_(seed) {}

  Config make() {
    Config config;
    for (const Field& field : schema()) {
      // Sizes that must fit together have their own draw below.
      if (field.name.starts_with("model.")) continue;
      std::visit([&](auto* target) { draw(*target, field.limits); }, field.ref(config));
    }
    const int64_t tokens = 1'000'000'000'000'000'000,
                  most = find_field("train.max_steps")->limits.int_high;
    config.train.max_steps = pick(0, std::min(most, tokens / tokens_per_step(config)));
    auto& model = config.model;
    model.num_heads = pick(1, 8);
    model.embedding_dim = 64 * model.num_heads * pick(1, 4);
    model.num_blocks = pick(1, 50);
    model.mlstm.round_proj_up_to_multiple_of = 64 * model.num_heads;
    if (pick(0, 1) == 1) {
      for (int64_t i = 0; i < model.num_blocks; i += pick(1, 9)) model.slstm_at.push_back(i);
      for (const char* name :
           {"model.dropout", "model.norm_eps", "model.bias", "model.slstm.cell",
            "model.slstm.bias_init", "model.feed_forward.act_fn", "model.mlstm.input_gate",
            "model.slstm.gate_proj", "model.feed_forward.gated", "model.mlstm.fgate",
            "model.slstm.recompute", "model.slstm.recurrent_clip", "model.slstm.recurrent_cut",
            "model.slstm.conv1d_kernel_size", "model.vocab_size", "model.mlstm_eps"}) {
        const Field& field = *find_field(name);
        std::visit([&](auto* target) { draw(*target, field.limits); }, field.ref(config));
      }
    } else {
      model.kind = "xlstm_large";
      model.mlstm.round_proj_up_to_multiple_of = 64;
      model.gate_soft_cap = real(0, 100);
    }
    return config;
  }

 private:
  int64_t pick(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }
  double real(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(random_);
  }

  void draw(int64_t& value, const Limits& limits) {
    const bool narrow = pick(0, 1) == 0;
    value = pick(limits.int_low,
                 narrow ? std::min(limits.int_high, limits.int_low + 9) : limits.int_high);
    if (limits.or_zero && pick(0, 3) == 0) value = 0;
  }
  void draw(double& value, const Limits& limits) {
    if (limits.high <= 1000) {
      value = limits.low + (limits.high - limits.low) * real(0.001, 0.999);
    } else {
      value = std::exp(real(-700, 700));  // the whole range of exponents
    }
    if (pick(0, 5) == 0) value = std::min(limits.high, 1.0) / 2;
  }
  void draw(bool& value, const Limits&) { value = pick(0, 1) == 1; }
  void draw(std::string& value, const Limits& limits) {
    if (!limits.choices.empty()) {
      value = limits.choices[static_cast<size_t>(
          pick(0, static_cast<int64_t>(limits.choices.size()) - 1))];
      if (value.ends_with("-N")) value.replace(value.size() - 1, 1, "123");
      return;
    }
    value = kNastyTexts[static_cast<size_t>(pick(0, static_cast<int64_t>(kNastyTexts.size()) - 1))];
    if (!limits.not_empty && pick(0, 3) == 0) value.clear();
  }
  template <typename T>
  void draw(std::vector<T>& list, const Limits& limits) {
    list.resize(static_cast<size_t>(pick(0, 5)));
    for (T& item : list) draw(item, limits);
  }
  void draw(DataSource& source, const Limits& limits) {
    Limits path;
    path.not_empty = true;
    draw(source.path, path);
    draw(source.weight, limits);
  }

  std::mt19937_64 random_;
};

}  // namespace

TEST_CASE("a printed configuration loads to the same one") {
  for (unsigned seed = 0; seed < 200; ++seed) {
    const Config config = RandomConfig(seed).make();
    const std::string text = print_config(config);
    INFO(text);
    Config loaded;
    const std::string message = message_of([&] { loaded = parse_config(text, "f.yaml"); });
    REQUIRE(message == "");
    REQUIRE(differences(config, loaded) == std::vector<std::string>());
    REQUIRE(print_config(loaded) == text);
  }
}

TEST_CASE("every nasty text survives in text fields and lists") {
  for (const std::string& text : kNastyTexts) {
    Config config;
    config.run.name = text;
    config.sample.prompts = {text, text};
    config.data.train = {{text, 0.1}};
    INFO(text);
    const Config loaded = parse_config(print_config(config), "f.yaml");
    CHECK(loaded.run.name == text);
    CHECK(loaded.sample.prompts == config.sample.prompts);
    REQUIRE(loaded.data.train.size() == 1);
    CHECK(loaded.data.train[0].path == text);
  }
}

TEST_CASE("every setting is printed, once, with its description") {
  const std::string text = print_config(Config());
  for (const Field& field : schema()) {
    INFO(field.name);
    const size_t place = text.find("# " + field.doc + " [" + describe_type(field) + "]\n");
    CHECK(place != std::string::npos);
  }
  CHECK(static_cast<size_t>(std::count(text.begin(), text.end(), '\n')) ==
        schema().size() + sections().size());
}

}  // namespace xlstm::config
