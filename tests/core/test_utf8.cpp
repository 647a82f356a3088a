// UTF-8 against a decoder of its own.
#include "csrc/core/utf8.h"

#include <random>
#include <string>

#include "tests/support/catch.h"

namespace xlstm {
namespace {

/// Well-formedness by decoding each character, written apart from the code under test.
size_t invalid_by_decoding(const std::string& s) {
  for (size_t i = 0; i < s.size();) {
    const auto byte = [&](size_t k) {
      return i + k < s.size() ? static_cast<unsigned char>(s[i + k]) : 0u;
    };
    const unsigned lead = byte(0);
    const size_t n = lead < 0x80       ? 1
                     : lead >> 5 == 6  ? 2
                     : lead >> 4 == 14 ? 3
                     : lead >> 3 == 30 ? 4
                                       : 0;
    if (n == 0) return i;
    unsigned code = n == 1 ? lead : lead & (0xffu >> (n + 1));
    for (size_t k = 1; k < n; ++k) {
      if (byte(k) >> 6 != 2) return i;
      code = code << 6 | (byte(k) & 0x3f);
    }
    const unsigned smallest[] = {0, 0, 0x80, 0x800, 0x10000};
    if (code < smallest[n] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return i;
    i += n;
  }
  return s.size();
}

TEST_CASE("utf8 validation agrees with decoding") {
  std::mt19937 random(5);
  const std::string parts[] = {"a",
                               "abcdefghijklmnopqrstuvwxyz",
                               "\xc3\xa9",
                               "\xe2\x82\xac",
                               "\xf0\x9f\x98\x80",
                               "\xed\xa0\x80",
                               "\xc0\x80",
                               "\xf4\x90\x80\x80",
                               "\xe0\x80\x80",
                               "\xff",
                               "\x80",
                               "\xf0\x9f"};
  int well_formed = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    std::string text;
    const unsigned pool = trial % 2 == 0 ? 5 : 12;
    for (unsigned n = random() % 8; n > 0; --n) text += parts[random() % pool];
    if (random() % 5 == 0 && !text.empty())
      text[random() % text.size()] = static_cast<char>(random());
    REQUIRE(find_invalid_utf8(text) == invalid_by_decoding(text));
    well_formed += find_invalid_utf8(text) == text.size();
  }
  CHECK(well_formed > 5000);
}

TEST_CASE("utf8 boundary never cuts a character") {
  const std::string text = "a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80z";
  const size_t want[] = {0, 1, 1, 3, 3, 3, 6, 6, 6, 6, 10, 11};
  for (size_t i = 0; i < 12; ++i) CHECK(utf8_boundary(text, i) == want[i]);
  CHECK(utf8_boundary(text, 100) == text.size());
}

TEST_CASE("a character that is cut is unfinished, one that is wrong is not") {
  for (const std::string character :
       {"a", "\xc3\xa9", "\xe0\xa0\x80", "\xed\x9f\xbf", "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf"}) {
    const Utf8Character whole = front_character(character + "\xff");
    CHECK(whole.is == Utf8Character::kValid);
    CHECK(whole.bytes == character.size());
    for (size_t size = 1; size < character.size(); ++size) {
      const std::string cut = character.substr(0, size);
      CHECK(front_character(cut).is == Utf8Character::kUnfinished);
      CHECK(front_character(cut).bytes == size);
      CHECK(front_character(cut + "a").is == Utf8Character::kInvalid);
      CHECK(front_character(cut + "a").bytes == size);
      CHECK(find_invalid_utf8(cut) == 0);
    }
  }
  for (const std::string wrong :
       {"\x80", "\xc1\x80", "\xe0\x9f", "\xed\xa0", "\xf0\x8f", "\xf4\x90", "\xf5"}) {
    CHECK(front_character(wrong).is == Utf8Character::kInvalid);
    CHECK(front_character(wrong).bytes == 1);
  }
}

}  // namespace
}  // namespace xlstm
