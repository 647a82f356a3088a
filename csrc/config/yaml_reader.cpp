#include "csrc/config/yaml_reader.h"

#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/mark.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <map>
#include <sstream>

#include "csrc/config/text.h"
#include "csrc/core/error.h"
#include "csrc/core/utf8.h"

namespace xlstm::config {
namespace {

constexpr size_t kMaxBytes = size_t{1} << 20;
constexpr size_t kMaxDepth = 16;
constexpr size_t kMaxNodes = 100000;

int line_of(std::string_view text, size_t offset) {
  return 1 + static_cast<int>(
                 std::count(text.begin(), text.begin() + static_cast<ptrdiff_t>(offset), '\n'));
}

// Builds the tree from yaml-cpp's events, which still show what its nodes hide: both values of a
// duplicate key, quotes, aliases.
class TreeBuilder : public YAML::EventHandler {
 public:
  explicit TreeBuilder(const YamlOrigin& origin) : origin_(origin) {}
  YamlNodePtr root() const { return root_; }

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (++documents_ > 1) {
      fail(mark, "a second document starts here ('---'), expected one per file; remove the line");
    }
  }
  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    auto node = make_node(YamlNode::Kind::kNull, mark);
    if (anchor != 0) anchors_[anchor] = node;
    add(node, mark);
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    check_tag(mark, tag);
    auto node = make_node(YamlNode::Kind::kScalar, mark);
    node->text = value;
    node->quoted = tag == "!";
    if (anchor != 0) anchors_[anchor] = node;
    add(node, mark);
  }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    const auto found = anchors_.find(anchor);
    if (found == anchors_.end()) fail(mark, "the alias stands inside its own anchor");
    add(found->second, mark);
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open(YamlNode::Kind::kList, mark, tag, anchor);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open(YamlNode::Kind::kMap, mark, tag, anchor);
  }
  void OnMapEnd() override { close(); }

 private:
  struct Frame {
    std::shared_ptr<YamlNode> node;
    YAML::anchor_t anchor = 0;
    YAML::Mark mark;
    bool has_key = false;  // a map's key waits for its value
    std::map<std::string, int> key_lines;
  };

  static std::shared_ptr<YamlNode> make_node(YamlNode::Kind kind, const YAML::Mark& mark) {
    auto node = std::make_shared<YamlNode>();
    node->kind = kind;
    node->line = mark.line + 1;
    return node;
  }

  [[noreturn]] void fail(const YAML::Mark& mark, const std::string& what) const {
    config_error(origin_.at(mark.line + 1), path(), what);
  }

  // Dotted key path of the place being read.
  std::string path() const {
    std::string out;
    for (const Frame& frame : frames_) {
      if (frame.node->kind == YamlNode::Kind::kList) {
        out += "[" + std::to_string(frame.node->items.size()) + "]";
      } else if (frame.has_key) {
        out += (out.empty() ? "" : ".") + frame.node->entries.back().key;
      }
    }
    return out;
  }

  void check_tag(const YAML::Mark& mark, const std::string& tag) const {
    if (!tag.empty() && tag != "?" && tag != "!") {
      fail(mark, "YAML tags are not supported, got " + in_quotes(tag) + "; write the plain value");
    }
  }

  void open(YamlNode::Kind kind, const YAML::Mark& mark, const std::string& tag,
            YAML::anchor_t anchor) {
    check_tag(mark, tag);
    if (frames_.size() >= kMaxDepth) {
      fail(mark, "nested deeper than " + std::to_string(kMaxDepth) + " levels, expected at most 3");
    }
    Frame frame;
    frame.node = make_node(kind, mark);
    frame.anchor = anchor;
    frame.mark = mark;
    frames_.push_back(std::move(frame));
  }

  void close() {
    const Frame frame = std::move(frames_.back());
    frames_.pop_back();
    if (frame.anchor != 0) anchors_[frame.anchor] = frame.node;
    add(frame.node, frame.mark);
  }

  void add(const YamlNodePtr& node, const YAML::Mark& mark) {
    if (frames_.empty()) {
      root_ = node;
      return;
    }
    Frame& top = frames_.back();
    if (top.node->kind == YamlNode::Kind::kMap && !top.has_key) {
      add_key(top, *node, mark);
      return;
    }
    top.node->size += node->size;
    if (top.node->size > kMaxNodes) {
      fail(mark, "more than " + std::to_string(kMaxNodes) + " values once aliases are expanded");
    }
    if (top.node->kind == YamlNode::Kind::kList) {
      top.node->items.push_back(node);
    } else {
      top.node->entries.back().value = node;
      top.has_key = false;
    }
  }

  void add_key(Frame& top, const YamlNode& node, const YAML::Mark& mark) {
    if (node.kind != YamlNode::Kind::kScalar) fail(mark, "expected a key as plain text");
    const auto [previous, inserted] = top.key_lines.emplace(node.text, mark.line + 1);
    top.node->entries.push_back({node.text, mark.line + 1, nullptr});
    top.has_key = true;
    if (!inserted) {
      const std::string first =
          origin_.has_lines ? ", first given on line " + std::to_string(previous->second) : "";
      fail(mark, "duplicate key" + first + "; keep one of them");
    }
  }

  const YamlOrigin& origin_;
  std::vector<Frame> frames_;
  std::map<YAML::anchor_t, YamlNodePtr> anchors_;
  YamlNodePtr root_ = std::make_shared<YamlNode>();
  int documents_ = 0;
};

void check_text(std::string_view text, const YamlOrigin& origin) {
  if (text.size() > kMaxBytes) {
    config_error(origin.at(1), "",
                 "larger than 1 MiB, expected a configuration; is this a data file?");
  }
  if (const size_t bad = find_invalid_utf8(text); bad != text.size()) {
    config_error(origin.at(line_of(text, bad)), "", "not UTF-8 text; save the file as UTF-8");
  }
  bool indentation = true;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto c = static_cast<unsigned char>(text[i]);
    if (c == '\t' && indentation) {
      config_error(origin.at(line_of(text, i)), "", "tab in the indentation; indent with spaces");
    }
    if (c < 0x20 && c != '\t' && c != '\n' && c != '\r') {
      config_error(
          origin.at(line_of(text, i)), "",
          "control character with code " + std::to_string(c) + "; remove it or write \"\\x..\"");
    }
    indentation = c == '\n' || (indentation && c == ' ');
  }
}

}  // namespace

void config_error(const std::string& where, const std::string& key, const std::string& what) {
  constexpr size_t kMaxKey = 200;
  std::string message = where + ": " + (key.empty() ? "" : key.substr(0, kMaxKey) + ": ") + what;
  // Keys may hold any character, a message is one line.
  std::replace_if(
      message.begin(), message.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20; },
      ' ');
  throw Error(ExitCode::kConfig, message);
}

YamlNodePtr read_yaml(std::string_view text, const YamlOrigin& origin) {
  if (text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);  // byte-order mark
  check_text(text, origin);
  // The end marker makes yaml-cpp notice a quote that is never closed.
  std::istringstream stream(std::string(text) + "\n...\n");
  TreeBuilder builder(origin);
  try {
    YAML::Parser parser(stream);
    while (parser.HandleNextDocument(builder)) {
    }
  } catch (const YAML::Exception& error) {
    const size_t end = text.find_last_not_of(" \n\r");
    const int last_line = line_of(text, end == std::string_view::npos ? 0 : end);
    const int line = std::clamp(error.mark.line + 1, 1, last_line);
    std::string what = "not valid YAML (" + error.msg + ")";
    if (error.msg.find("document indicator") != std::string::npos) {
      what = "not valid YAML: a quote opened before is never closed; add the closing quote";
    } else if (error.msg.find("illegal map value") != std::string::npos) {
      what += "; check the indentation, and quote text that contains ': '";
    }
    config_error(origin.at(line), "", what);
  }
  return builder.root();
}

}  // namespace xlstm::config
