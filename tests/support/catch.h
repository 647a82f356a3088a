#pragma once
// Catch2 2.13 (Debian 12) and 3.x under one name.
// torch's logging has a CHECK of its own, which aborts: it comes first, so that Catch2's is the one in force.
#include <c10/util/Logging.h>
#undef CHECK
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
using Catch::Approx;
#else
#include <catch2/catch.hpp>
#endif
